"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch; `scripts/setup.sh test` installs it.

vLLM's modules of multimodal models import torchvision. Its operators are in a library that a CPU build of torch cannot
load, and its Python code fails where two of them are not declared. Scoring text calls none, so they are declared here,
with nothing behind them, just before torchvision's own code runs. A `.pth` file has every Python of the environment
import this module: until then it costs nothing.
"""

import importlib.machinery
import sys

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
kept = []


class Finder:
    """Finds torchvision where Python would, and has it declare its operators first."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def declare_and_run(module):
                declare()
                run(module)

            spec.loader.exec_module = declare_and_run
        return spec


def declare():
    """Declare what is not declared yet."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    kept.append(library)  # its declarations are gone when it is
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + SIGNATURE)


sys.meta_path.insert(0, Finder)
