"""The last lines of `make faults`: every fault with its outcome, and how many there were."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what the tests recorded."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
    lines = [text for report in reports for name, text in report.user_properties if name == "fault"]
    if lines:
        failed = sum(r.outcome == "failed" and "tests/faults" in r.nodeid for r in reports)
        terminalreporter.write_line("\n".join(lines))
        terminalreporter.write_line(f"{len(lines)} faults struck; {failed} tests failed")
