"""Chats in which an assistant calls a tool, from rows to a trained model: python examples/tool_chat.py OUT

Only what the assistant writes is trained on, calls included; the end of a turn is never dropped. The loss is divided by
the trainable tokens, so that the tokens that stay weigh no more than they would without dropping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steps import directory, run

from entrodrop_prep import TrainingConfig

CITIES = {"Oslo": -3, "Lima": 19, "Cairo": 31, "Quito": 14, "Perth": 24, "Turin": 8, "Osaka": 12}
DAYS = ("today", "tomorrow", "on Friday", "tonight")
TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Degrees Celsius in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "string"}}},
    },
}


def chat(city: str, day: str, degrees: int) -> dict[str, Any]:
    """A question, the call of the tool, its result and the answer."""
    call = {"type": "function", "function": {"name": "temperature", "arguments": {"city": city, "day": day}}}
    coat = "Take a coat." if degrees < 10 else "No coat is needed."
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": f"How warm will it be in {city} {day}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f'{{"degrees": {degrees}}}'},
            {"role": "assistant", "content": f"It will be {degrees} degrees in {city} {day}. {coat}"},
        ],
    }


def main() -> None:
    run(
        directory(),
        [chat(city, day, base + n) for n, day in enumerate(DAYS) for city, base in CITIES.items()],
        scoring={"chat_template": str(Path(__file__).parent / "tool_chat.jinja")},
        masks={"add_columns": ("n_trainable",)},
        training=TrainingConfig(batch_size=8, grad_accum=1, lr=5e-4),
    )


if __name__ == "__main__":
    main()
