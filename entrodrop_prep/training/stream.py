"""Masked rows in order for several ranks and worker processes, and the position where a run resumes.

A step of training takes the global batch of B * N rows, B = batch_size, N = world_size: step g the rows at positions
[g * B * N, (g + 1) * B * N), of which rank r has its B in order. Worker w of W makes the batches of steps g with
g % W = w, and as a DataLoader takes batches from its workers in turn, they come in order, whatever W.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from entrodrop_prep.errors import ConfigError

if TYPE_CHECKING:
    from entrodrop_prep.training.rows import MaskedRows, Row

_ALL = -1
_EPOCH, _ROWS, _LED, _WORKERS = range(4)
"""What is in shared memory: epoch of the next pass (or ``_ALL``) and rows before it, whether a ``MaskedLoader`` says
before every pass where it begins, and whether worker processes make the rows."""
_USE_LOADER = "use MaskedLoader, which resumes with any numbers"
_OURS = ("batch_size", "batch_sampler", "drop_last", "in_order", "sampler", "shuffle")


class MaskedStream(IterableDataset["Row"]):
    """The rows of one rank, in order, for a DataLoader of the same ``batch_size`` and any number of workers.

    Without ``epoch`` it holds all epochs, one after the other, in one pass; with one, that epoch, and ``set_epoch``
    moves on, also in worker processes that live on (the number is in shared memory).

    The last step of a pass may have fewer than B * N rows. They are shared out in order and as evenly as can be, so
    that none is lost and none comes twice; where they are fewer than the ranks, the last ranks get none, and one batch
    less. ``drop_last`` leaves them out.

    Its state is ``{"epoch", "rows"}``: rows of the pass before the next step of this process, over all ranks. In a
    worker that is the next step of that worker's own: torchdata's StatefulDataLoader saves and restores each worker.
    Such a position means the same rows only with the same ``batch_size``, ``world_size`` and number of workers, so
    these are in the state of a worker, and others are refused. ``MaskedLoader`` resumes with others.

    Where workers make the rows, the stream in the main process does not know how many of them were trained on, and
    cannot say where they are to begin a single time: it has no state then, and a plain DataLoader resumes from none.
    """

    def __init__(
        self,
        rows: MaskedRows,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        epoch: int | None = None,
        drop_last: bool = False,
    ) -> None:
        """Prefer ``MaskedRows.stream``.

        Args:
            rows: the rows of all epochs.
            batch_size: rows in a batch of one rank.
            rank: this process, from 0.
            world_size: number of ranks.
            epoch: the epoch of the first pass, from 0; None: all epochs in one pass.
            drop_last: whether to leave out a last step of fewer than batch_size * world_size rows.

        Raises:
            ConfigError: a number is out of range, or there is no such epoch.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", fix="give 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size}", fix="ranks count from 0")
        rows.span(epoch)
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size
        self.drop_last, self._all = drop_last, epoch is None
        self._shared = torch.tensor([_ALL if epoch is None else epoch, 0, False, False], dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._own: tuple[int | None, int] | None = None
        self._pass: _Pass | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch that the next pass gives; None for all."""
        epoch = int(self._shared[_EPOCH])
        return None if epoch == _ALL else epoch

    @property
    def total_rows(self) -> int:
        """Rows of a pass, of all ranks together."""
        first, stop = self.rows.span(self.epoch)
        return stop - first

    def set_epoch(self, epoch: int) -> None:
        """Give another epoch from the next pass on, from its first row.

        Raises:
            ConfigError: there is no such epoch, or the stream holds all epochs in one pass.
        """
        if self._all:
            if epoch:
                raise ConfigError("this stream holds all epochs in one pass", fix="train one epoch, or stream(epoch=0)")
        elif epoch != self.epoch:
            self.rows.span(epoch)
            self.seek(epoch, 0)

    def seek(self, epoch: int | None, rows: int) -> None:
        """Begin the next pass after the first ``rows`` rows of ``epoch``, counted over all ranks.

        Raises:
            ConfigError: this stream has no such epoch or row.
        """
        first, stop = self.rows.span(epoch)
        if (epoch is None) != self._all or not 0 <= rows <= stop - first:
            of = "all epochs" if epoch is None else f"epoch {epoch}"
            raise ConfigError(
                f"the state is at row {rows} of {of}, which this stream does not have",
                fix="use the state of such a stream",
            )
        self._shared.copy_(torch.tensor([_ALL if epoch is None else epoch, rows, False, False]))

    def lead(self, epoch: int | None, rows: int) -> None:
        """As ``seek``, for a loader that says before every pass where it begins, and counts what it handed out."""
        self.seek(epoch, rows)
        self._shared[_LED] = True

    def state_dict(self) -> dict[str, Any]:
        """The position of this process: ``{"epoch", "rows"}``, see the class.

        Raises:
            ConfigError: worker processes make the rows.
        """
        if get_worker_info() is None and self._shared[_WORKERS]:
            raise ConfigError(
                "the stream's rows are made in worker processes, and it does not know how many were trained on",
                fix="use MaskedLoader and its state_dict",
            )
        if self._pass is None:
            return {"epoch": self.epoch, "rows": int(self._shared[_ROWS]), **self._numbers()}
        return {"epoch": self._pass.epoch, "rows": min(self._pass.position, self._pass.total), **self._numbers()}

    def _numbers(self) -> dict[str, int]:
        """What a worker's position depends on; nothing in the main process, whose position is that of all ranks."""
        worker = get_worker_info()
        if worker is None:
            return {}
        return {"batch_size": self.batch_size, "world_size": self.world_size, "num_workers": worker.num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state with the next pass.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ConfigError: it is of another kind of stream, or of a worker with other numbers.
        """
        epoch, rows, numbers = state["epoch"], int(state["rows"]), self._numbers()
        was = {name: state[name] for name in ("batch_size", "world_size", "num_workers") if name in state}
        if was != numbers:
            saved, now = (", ".join(f"{k}={v}" for k, v in n.items()) or "no workers" for n in (was, numbers))
            raise ConfigError(f"the state is one of {saved}, this is {now}", fix=_USE_LOADER)
        if get_worker_info() is None:
            self.seek(epoch, rows)
            self._pass = None
        else:
            self._own = epoch, rows

    def steps(self, rows: int) -> int:
        """Batches that this rank gets of the last ``rows`` rows of a pass."""
        whole, rest = divmod(rows, self.batch_size * self.world_size)
        return whole + (not self.drop_last and _share(rest, self.rank, self.world_size)[1] > 0)

    def __len__(self) -> int:
        """Rows of this rank in the next pass."""
        step = self.batch_size * self.world_size
        whole, rest = divmod(self.total_rows - int(self._shared[_ROWS]), step)
        return whole * self.batch_size + (0 if self.drop_last else _share(rest, self.rank, self.world_size)[1])

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        step = self.batch_size * self.world_size
        if self._own is not None:
            (epoch, position), self._own = self._own, None
        else:
            epoch, position = self.epoch, int(self._shared[_ROWS]) + (worker.id * step if worker else 0)
            if worker and self._shared[_ROWS] and not self._shared[_LED]:
                raise ConfigError("a plain DataLoader with workers cannot resume from a state", fix=_USE_LOADER)
        self._shared[_WORKERS] = worker is not None
        if worker is None:
            self._shared[_ROWS] = 0
        self._pass = _Pass(self, epoch, position, step * (worker.num_workers if worker else 1))
        return self._pass


class _Pass(Iterator["Row"]):
    """One process's rows of a pass. ``position`` is the row of the pass at which its next step begins."""

    def __init__(self, stream: MaskedStream, epoch: int | None, position: int, stride: int) -> None:
        self.epoch, self.position = epoch, position
        self._stream, self._stride = stream, stride
        self._first, stop = stream.rows.span(epoch)
        self.total = stop - self._first
        self._held: list[Row] = []

    def __next__(self) -> Row:
        if not self._held:
            self._held = self._batch()[::-1]
            if not self._held:
                raise StopIteration
        row = self._held.pop()
        if not self._held:
            self.position += self._stride
        return row

    def _batch(self) -> list[Row]:
        """This rank's rows of the step at ``position``."""
        stream = self._stream
        left = self.total - self.position
        offset, count = stream.rank * stream.batch_size, stream.batch_size
        if left < stream.batch_size * stream.world_size:
            offset, count = (0, 0) if stream.drop_last else _share(max(0, left), stream.rank, stream.world_size)
        begin = self._first + self.position + offset
        return stream.rows.__getitems__(range(begin, begin + count))


class MaskedLoader(DataLoader["Row"]):
    """A DataLoader over a ``MaskedStream`` that knows how many rows it handed out, and resumes after them.

    Its state is ``{"epoch", "rows", "batches"}``: what was handed out in this pass, over all ranks. Rows that workers
    made ahead are not counted, so none is lost. It resumes in the same order with any number of workers, ranks and any
    batch size; a state of one rank is that of all.
    """

    def __init__(self, stream: MaskedStream, **options: Any) -> None:
        """``options`` are those of ``torch.utils.data.DataLoader``, without what decides the order."""
        for name in _OURS:
            if name in options:
                raise ConfigError(
                    f"MaskedLoader takes no {name}", fix="it is the stream's: rows.stream(batch_size, ...)"
                )
        super().__init__(stream, batch_size=stream.batch_size, **options)
        self.stream = stream
        self._epoch, self._rows, self._batches, self._resumed = stream.epoch, 0, 0, False

    def set_epoch(self, epoch: int) -> None:
        """See ``MaskedStream.set_epoch``."""
        self.stream.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of the pass: those handed out and those to come."""
        if self._epoch != self.stream.epoch:
            return self.stream.steps(self.stream.total_rows)
        return self._batches + self.stream.steps(self.stream.total_rows - self._rows)

    def __iter__(self) -> Any:
        if not self._resumed or self._epoch != self.stream.epoch:
            self._rows = self._batches = 0
        self._resumed, self._epoch = False, self.stream.epoch
        self.stream.lead(self._epoch, self._rows)
        return self._counted(super().__iter__())

    def _counted(self, batches: Any) -> Iterator[Any]:
        step = self.stream.batch_size * self.stream.world_size
        for batch in batches:
            self._rows = min(self._rows + step, self.stream.total_rows)
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What was handed out: ``{"epoch", "rows", "batches"}``, rows over all ranks."""
        if self._epoch != self.stream.epoch:
            return {"epoch": self.stream.epoch, "rows": 0, "batches": 0}
        return {"epoch": self._epoch, "rows": self._rows, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after what was handed out, with the next pass.

        A state of an epoch before the stream's own is over, and leaves the loader as it is.

        Args:
            state: what ``state_dict`` returned, of any number of workers, ranks and batch size.

        Raises:
            ConfigError: it is of another kind of stream.
        """
        epoch = state["epoch"]
        if epoch is not None and self.stream.epoch is not None and epoch < self.stream.epoch:
            return
        self.stream.seek(epoch, int(state["rows"]))
        self._epoch, self._rows, self._batches = epoch, int(state["rows"]), int(state["batches"])
        self._resumed = True


def _share(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and number of the rows of a rank where ``rows`` are shared out in order."""
    each, more = divmod(rows, world_size)
    return rank * each + min(rank, more), each + (rank < more)
