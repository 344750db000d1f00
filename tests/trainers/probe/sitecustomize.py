"""Notes what a language model is trained on, in a trainer's own process, whose environment lacks this package.

Python imports a ``sitecustomize`` on its path by itself. With ``PROBE_OUT`` in the environment, torch's own hooks are
set on each module that gets an ``lm_head``; nothing of the trainer's is changed. For every forward pass with gradients
one line of JSON is written when the process ends:

- ``input_ids``, and ``attention_mask``, ``position_ids``, ``labels`` where the model is given them, [B, T] each;
- ``trained``, [B, T]: labels read off the gradient. Cross entropy has the gradient (p - onehot) / n by the logits,
  which is below 0 at the label alone, and 0 everywhere where there is no loss. The logits at t predict t + 1, so
  ``trained[t + 1]`` is that place, or -100; ``trained[0]`` is -100.

With ``PROBE_STOP=N`` the process ends before the forward pass after the Nth, as one that is killed.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
from typing import Any

COLUMNS = ("input_ids", "attention_mask", "position_ids", "labels")
IGNORE = -100


class Probe:
    """The hooks, and what they noted."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.calls: list[dict[str, Any]] = []
        atexit.register(self.write)

    def registered(self, module: Any, name: str, submodule: Any) -> None:
        """A torch module got a part."""
        if name == "lm_head" and submodule is not None:
            module.register_forward_pre_hook(self.called, with_kwargs=True)
            submodule.register_forward_hook(self.predicted)
        if name == "base_model" and type(module).__name__.startswith("PeftModel"):  # calls no hook of the model inside
            module.register_forward_pre_hook(self.called, with_kwargs=True)

    def called(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        if torch.is_grad_enabled():
            if len(self.calls) == int(os.environ.get("PROBE_STOP", -1)):
                self.write()
                os._exit(1)
            given = dict(inspect.signature(type(module).forward).bind_partial(module, *args).arguments) | kwargs
            given.setdefault("input_ids", given.get("idx"))  # LitGPT's name
            call = {n: given[n].detach().cpu().tolist() for n in COLUMNS if given.get(n) is not None}
            self.calls.append({**call, "gradients": []})

    def predicted(self, module: Any, args: Any, logits: Any) -> None:
        if logits.requires_grad and self.calls:
            gradients = self.calls[-1]["gradients"]
            place = len(gradients)  # an lm_head may be called for a part of the positions at a time
            gradients.append(None)

            def note(gradient: Any) -> None:
                label = gradient.argmin(-1)
                label[gradient.abs().amax(-1) == 0] = IGNORE
                gradients[place] = label.cpu().tolist()

            logits.register_hook(note)

    def write(self) -> None:
        if not self.calls:
            return
        with open(self.out, "a", encoding="utf-8") as f:
            for call in self.calls:
                parts = call.pop("gradients")
                rows = range(len(call["input_ids"]))
                lines = [[x for p in parts for x in p[b]] if all(parts) else [] for b in rows]
                call["trained"] = [[IGNORE, *line[:-1]] for line in lines]
                f.write(json.dumps(call) + "\n")


if "PROBE_OUT" in os.environ:
    from torch.nn.modules.module import register_module_module_registration_hook

    register_module_module_registration_hook(Probe(os.environ["PROBE_OUT"]).registered)
