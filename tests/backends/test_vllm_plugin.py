"""What the plugin does to vLLM programs that have nothing to do with it: nothing but new names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entrodrop_prep.backends.architectures import PROVEN, installed_vllm, plugin_is_installed
from entrodrop_prep.vllm_plugin.plugin import PREFIX
from helpers.models import save_model, tiny_llama
from helpers.vllm import VLLM, environment

pytestmark = pytest.mark.vllm

IMPORT = """
import json, sys
before = set(sys.modules)
import entrodrop_prep.vllm_plugin.plugin
print(json.dumps(sorted(set(sys.modules) - before)))
"""

PROGRAM = """
import json, os, sys
import vllm.envs, vllm.plugins
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from entrodrop_prep.vllm_plugin.plugin import register

tables = {"models": ModelRegistry.models, "configs": MODELS_CONFIG_MAP}


def registered():
    before = {name: dict(table) for name, table in tables.items()}
    register()
    once = {name: dict(table) for name, table in tables.items()}
    register()
    ours = {"entrodrop_prep.vllm_plugin.models", "entrodrop_prep.vllm_plugin.pooler"}
    said = {"loaded": sorted(ours & set(sys.modules))}
    for name, table in tables.items():
        said[name] = {
            "before": len(before[name]),
            "kept": all(once[name][key] is value for key, value in before[name].items()),
            "new": sorted(once[name].keys() - before[name].keys()),
            "twice": list(table) == list(once[name]) and all(table[key] is v for key, v in once[name].items()),
        }
    said["hooked"] = sorted(key for key in before["configs"] if key in before["models"])
    said["files"] = {name: once["models"][name]._get_cache_filename() for name in said["models"]["new"]}
    for name, table in tables.items():  # for the plugin, which vLLM loads in the next run
        for key in said[name]["new"]:
            del table[key]
    return said


def plain(positions):
    return [p and {token: repr(x.logprob) for token, x in sorted(p.items())} for p in positions]


def unrelated():
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, seed=0)
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    parameters = SamplingParams(prompt_logprobs=5, logprobs=5, **greedy)
    prompts = [{"prompt_token_ids": [3 + (7 * i * j) % 90 for i in range(2 + 9 * j)]} for j in range(1, 5)]
    found = [
        {
            "prompt": plain(output.prompt_logprobs),
            "ids": list(output.outputs[0].token_ids),
            "logprobs": plain(output.outputs[0].logprobs),
        }
        for output in llm.generate(prompts, parameters, use_tqdm=False)
    ]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    ours = [name for name in ModelRegistry.get_supported_archs() if name.startswith("TokenEntropy")]
    return {"found": found, "ours": len(ours)}


os.environ["VLLM_PLUGINS"] = ""
said = {"without": unrelated(), "registered": registered()}
del os.environ["VLLM_PLUGINS"]
vllm.envs.disable_envs_cache()
vllm.plugins.plugins_loaded = False
said["with"] = unrelated()
json.dump(said, open(sys.argv[2], "w"))
"""


def python(program: str, *arguments: Path, run: Any = subprocess.run, **more: str) -> str:
    done = run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_it_loads_the_standard_library_alone() -> None:
    loaded = json.loads(python(IMPORT))
    ours = [name for name in loaded if name.split(".")[0] == "entrodrop_prep"]
    assert ours == ["entrodrop_prep", "entrodrop_prep.vllm_plugin", "entrodrop_prep.vllm_plugin.plugin"]
    assert {name.split(".")[0] for name in loaded if name not in ours} <= sys.stdlib_module_names


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a program says without the plugin and then with it, and what ``register`` does to vLLM's tables."""
    home = tmp_path_factory.mktemp("plugin")
    model = save_model(home / "model", tiny_llama(head_dim=32), scale=8.0)
    python(PROGRAM, model, home / "said.json", run=VLLM.run)
    found: dict[str, Any] = json.loads((home / "said.json").read_text())
    return found


@pytest.fixture
def registered(said: dict[str, Any]) -> dict[str, Any]:
    return dict(said["registered"])


def test_registering_adds_names_and_changes_none(registered: dict[str, Any]) -> None:
    for table in ("models", "configs"):
        assert registered[table]["before"] > 10
        assert registered[table]["kept"]
        assert registered[table]["new"]
        assert all(name.startswith(PREFIX) for name in registered[table]["new"])
    assert {PREFIX + name for name in PROVEN} <= set(registered["models"]["new"])
    assert not registered["loaded"]  # a variant is made when a run asks for it


def test_registering_twice_does_nothing(registered: dict[str, Any]) -> None:
    assert registered["models"]["twice"]
    assert registered["configs"]["twice"]


def test_a_variant_has_the_adjustments_of_its_architecture(registered: dict[str, Any]) -> None:
    """vLLM looks these up by the architecture's name, which a variant changes."""
    variants = {PREFIX + name for name in registered["hooked"]} & set(registered["models"]["new"])
    assert variants == set(registered["configs"]["new"])


def test_what_vllm_keeps_of_a_variant_is_of_this_version(registered: dict[str, Any]) -> None:
    vllm = installed_vllm()
    assert vllm is not None
    version = vllm.version.replace(".", "_").replace("+", "_")
    assert all(version in name for name in registered["files"].values())
    assert len(set(registered["files"].values())) == len(registered["models"]["new"])


def test_it_is_an_entry_point_of_vllm() -> None:
    assert plugin_is_installed()


def test_another_program_says_the_same_with_and_without_it(said: dict[str, Any]) -> None:
    active, bare = said["with"], said["without"]
    assert active["ours"] > 50
    assert bare["ours"] == 0
    assert active["found"] == bare["found"]
    assert [len(row["ids"]) for row in bare["found"]] == [12] * 4
    assert all(len(position) >= 5 for row in bare["found"] for position in row["prompt"][1:])
