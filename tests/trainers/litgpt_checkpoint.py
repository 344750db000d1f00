"""Write a small LitGPT checkpoint with random weights, by LitGPT's own Python.

usage: litgpt_checkpoint.py TOKENIZER OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from litgpt import GPT, Config
from litgpt.utils import save_config

tokenizer, out = map(Path, sys.argv[1:])
shutil.copytree(tokenizer, out)
config = Config(
    name="tiny",
    block_size=128,
    vocab_size=97,
    padded_vocab_size=97,
    n_layer=2,
    n_head=4,
    n_query_groups=2,
    n_embd=32,
    intermediate_size=48,
    mlp_class_name="LLaMAMLP",
    norm_class_name="RMSNorm",
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
)
torch.manual_seed(0)
torch.save(GPT(config).state_dict(), out / "lit_model.pth")
save_config(config, out)
