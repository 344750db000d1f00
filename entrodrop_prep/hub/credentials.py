"""The token: from HF_TOKEN, the login, or stdin; sent to the Hub and written nowhere."""

from __future__ import annotations

import sys

from entrodrop_prep.errors import ConfigError

HIDDEN = "[token]"


def find_token(*, from_stdin: bool) -> str:
    """The token to push with. Raises ConfigError where there is none."""
    if from_stdin:
        token = sys.stdin.readline().strip()
        if not token:
            raise ConfigError("--token-stdin: stdin is empty", fix="pipe the token into the command, on one line")
    else:
        from huggingface_hub import get_token

        token = get_token() or ""
        if not token:
            raise ConfigError(
                "there is no token for the Hub",
                fix="log in with `hf auth login`, set HF_TOKEN, or pipe the token to --token-stdin",
            )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the token for the Hub holds characters that none has", fix="copy it again from the Hub")
    return token


def without(text: str, token: str) -> str:
    """A text that shall be shown, with the token made unreadable should it hold it."""
    return text.replace(token, HIDDEN) if token else text
