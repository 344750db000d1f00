"""Every error a user can cause, in one tree.

    EntrodropError            the command line prints exactly this family as one line and exits with 2
    ├── ConfigError           an option, a flag or a recipe file
    ├── SourceError           the input cannot be found, opened or understood
    │   └── RowError          one row of it is bad (number, file and line, column)
    ├── ModelError            a model or a tokenizer is missing, gated, or does not fit
    ├── ScoreError            the model gave no usable scores
    │   └── EngineError       every engine has ended: another process, or another try, may do better
    ├── OutputError           the output directory cannot be used
    │   ├── MismatchError     it belongs to another run
    │   └── DiskSpaceError    it does not have the room
    ├── IntegrityError        a scored or masked directory is incomplete or damaged
    │   └── UnsupportedError  an earlier version made it, and this one does not read it
    ├── ArrivalError          a trainer gave its model something else than what was written
    └── HubError              the Hub refused, could not be reached, or gave back something else

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from entrodrop_prep.terminal.text import one_line, printable, shown_url, without_secrets


class EntrodropError(Exception):
    """What went wrong, where, and how to fix it; ``str()`` is one line."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)

    def __str__(self) -> str:
        line = f"{self.what}; {self.fix}" if self.fix else self.what
        if not self.where:
            return one_line(line)
        is_url = "://" in self.where.split(" ")[0]
        where = shown_url(self.where) if is_url else without_secrets(self.where)
        return f"{printable(where)}: {one_line(line)}"


class ConfigError(EntrodropError):
    """An option, a flag or a recipe file holds a value that cannot be used."""


class SourceError(EntrodropError):
    """The input cannot be found, opened or understood."""


class RowError(SourceError):
    """One row of the input cannot be used; ``--on-bad-row skip`` sets it aside."""


class ModelError(EntrodropError):
    """A model or a tokenizer is missing, gated, or does not fit what it is asked to do."""


class ScoreError(EntrodropError):
    """The model returned scores that cannot be stored (not finite, too few)."""


class EngineError(ScoreError):
    """Every engine has ended; another process, or another try, may do better."""


class OutputError(EntrodropError):
    """The output directory cannot be used."""


class MismatchError(OutputError):
    """The output directory belongs to a run with other settings."""


class DiskSpaceError(OutputError):
    """The output directory does not have the room."""


class IntegrityError(EntrodropError):
    """A scored or masked directory is incomplete or damaged."""


class UnsupportedError(IntegrityError):
    """A directory is of a form that only earlier versions read."""


class ArrivalError(EntrodropError):
    """Batches of a trainer are not the rows of a masked directory."""


class HubError(EntrodropError):
    """The Hub refused, could not be reached, or gave back something else than what was pushed."""
