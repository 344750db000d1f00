"""How far long work is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from entrodrop_prep.terminal.output import shows_progress

LOG_EVERY = 30.0


class Progress:
    """Progress in rows (or bytes) for the estimate of the end, and in tokens, or what ``per`` says, for the speed."""

    def __init__(self, what: str, total: int | None, unit: str, done: float = 0, per: str = "tokens") -> None:
        from tqdm import tqdm

        self._what, self._total, self._unit, self._first, self._per = what, total, unit, done, per
        self._units, self._tokens = done, 0
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            unit_scale=True,
            desc=what,
            disable=not (shows_progress() and sys.stderr.isatty()),
            dynamic_ncols=True,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}{postfix}]"
            if total
            else None,
        )

    def begin(self) -> None:
        """What came before was preparation: speed and estimate count from now."""
        self._start = self._said = time.monotonic()
        if not self._bar.disable:
            self._bar.start_t = self._bar.last_print_t = time.time()

    def skip(self, units: float) -> None:
        """Some was done by an earlier run."""
        with self._lock:
            self._first += units
            self._units += units
            if not self._bar.disable:
                for name in ("initial", "n", "last_print_n"):  # no progress of this run, to the bar's estimate either
                    setattr(self._bar, name, getattr(self._bar, name) + units)
                self._bar.refresh()

    def add(self, units: float, tokens: int) -> None:
        """Some more is done."""
        with self._lock:
            self._add(units, tokens)

    def _add(self, units: float, tokens: int) -> None:
        self._units += units
        self._tokens += tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._start, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{speed:,.0f} {self._per}/s", refresh=False)
            self._bar.update(units)
        elif shows_progress() and now - self._said > LOG_EVERY:
            self._said = now
            done = f"{self._share()}{self._tokens:,} {self._per}, {speed:,.0f} {self._per}/s"
            print(f"{self._what}: {done}{self._eta(now)}", file=sys.stderr, flush=True)

    def wait(self, what: str) -> None:
        """Nothing is done here but to wait for what others do."""
        with self._lock:
            now = time.monotonic()
            if not self._bar.disable:
                self._bar.set_postfix_str(f"waiting: {what}")
            elif shows_progress() and now - self._said > LOG_EVERY:
                self._said = now
                print(f"{self._what}: {self._share()}waiting: {what}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start, or since ``begin``."""
        return time.monotonic() - self._start

    def _share(self) -> str:
        return f"{self._units / self._total:.0%} of the {self._unit}, " if self._total else ""

    def _eta(self, now: float) -> str:
        done = self._units - self._first
        if not self._total or done <= 0:
            return ""
        left = (now - self._start) * max(0.0, self._total - self._units) / done
        return f", about {left / 60:.0f} min left" if left >= 60 else ", less than a minute left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()
