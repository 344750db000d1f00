"""Source files, from rows to a trained model: python examples/code.py OUT

Long files are split into windows that overlap, and the rows are packed; their documents stay apart while it trains.
"""

from __future__ import annotations

from pathlib import Path

from steps import directory, run

import entrodrop_prep
from entrodrop_prep import TrainingConfig


def main() -> None:
    package = Path(entrodrop_prep.__file__).parent
    shortest = sorted(package.glob("masking/*.py"), key=lambda file: file.stat().st_size)[:7]
    run(
        directory(),
        [{"text": file.read_text(encoding="utf-8"), "name": file.name} for file in reversed(shortest)],
        scoring={"id_column": "name", "max_length": 256, "overlap": 32},
        masks={"pack": 256, "add_columns": ("position_ids",)},
        training=TrainingConfig(grad_accum=8, lr=5e-4),
    )


if __name__ == "__main__":
    main()
