"""Train in one of several processes; the first writes what came of it. Arguments: model, rows as JSON, folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_losses import Ours, trained, trainer_of

if __name__ == "__main__":
    model, rows, out = map(Path, sys.argv[1:])
    trainer = trainer_of(
        Ours, model, json.loads(rows.read_text()), out, gradient_accumulation_steps=3, ddp_backend="gloo"
    )
    found = trained(trainer)
    if trainer.args.process_index == 0:
        torch.save(
            {name.removeprefix("module."): value for name, value in found.items()}
            | {"processes": trainer.args.world_size},
            out.with_suffix(".pt"),
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads of gloo that still run at the end abort a process now and then
