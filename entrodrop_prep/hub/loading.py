"""Loading with the Hugging Face libraries: what they raise, as one error that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

from entrodrop_prep.config.names import user_path
from entrodrop_prep.errors import ModelError
from entrodrop_prep.hub.read_errors import asking, refusal


@contextmanager
def loading(name: str, what: str) -> Iterator[None]:
    """Turn the Hugging Face libraries' refusals to load into a ModelError that says what to do."""
    from huggingface_hub.errors import RemoteEntryNotFoundError, StrictDataclassError
    from safetensors import SafetensorError

    try:
        with _TokenizersErrors(), nullcontext() if os.path.isdir(user_path(name)) else asking(what, name):
            yield
    except (
        *(LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError),
        StrictDataclassError,
    ) as e:
        # What the libraries raise for files that are JSON but not what a model or a tokenizer needs.
        text = " ".join(f"{type(e).__name__}: {e}".split())
        raise ModelError(
            f"cannot load the {what}, its files are not as they should be: {text[:300]}",
            where=name,
            fix="fetch it again, or repair its JSON files",
        ) from e
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        known = None if isinstance(e, RemoteEntryNotFoundError) else refusal(e, "model", name)
        if known is not None:
            raise ModelError(f"cannot load the {what}: {known[0]}", where=name, fix=known[1]) from e
        text = " ".join(str(e).split())
        lower = text.lower()
        if "trust_remote_code" in lower:
            fix = "read its code, then add --trust-remote-code"
        elif "offline" in lower or "couldn't connect" in lower or "connection" in lower:
            fix = "check the network and the id; a local directory is written ./NAME"
        elif isinstance(e, ImportError):
            fix = "install what it names"
        elif isinstance(e, SafetensorError):
            fix = "a file of weights is damaged: fetch it again"
        elif isinstance(e, (json.JSONDecodeError, UnicodeDecodeError)):
            fix = "fetch it again, or repair its JSON files"
        else:
            fix = "check the name and the revision"
        raise ModelError(f"cannot load the {what}: {text[:300]}", where=name, fix=fix) from e


class _TokenizersErrors(AbstractContextManager[None]):
    """Turns what the tokenizers library raises for a file that it cannot read, a bare Exception, into a ValueError."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is Exception:
            raise ValueError(str(error)) from error
