"""Sums worked out column by column, from rows to a trained model: python examples/maths.py OUT

Only the answer is trained on, and the carries that surprised the reference model are never dropped.
"""

from __future__ import annotations

from steps import directory, run

from entrodrop_prep import TrainingConfig


def worked(a: int, b: int) -> str:
    """``a + b`` column by column, units first."""
    lines, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"answer: {a + b}"])


def main() -> None:
    pairs = [(17 * n % 997, 101 * n % 991) for n in range(1, 31)]
    run(
        directory(),
        [{"prompt": f"What is {a} + {b}?\n", "completion": worked(a, b)} for a, b in pairs],
        scoring={},
        masks={"keep_surprising": 3.0, "rows_multiple": 8},
        training=TrainingConfig(batch_size=8, grad_accum=1, lr=5e-4),
    )


if __name__ == "__main__":
    main()
