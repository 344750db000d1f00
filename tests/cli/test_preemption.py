"""SIGTERM and SIGUSR1: what was begun may be finished, nothing new is begun, and the run ends in time."""

# ruff: noqa: PT012  (a signal and what must not follow it are in one block)
from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from entrodrop_prep.errors import ScoreError
from entrodrop_prep.terminal import preemption
from entrodrop_prep.terminal.preemption import SIGNALS, Preempted, Preemption, preemptible


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> object:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_work_it_ends_at_once(number: signal.Signals) -> None:
    with pytest.raises(Preempted, match=f"stopped by {number.name}") as e, preemptible():
        send(number)
        pytest.fail("the signal did not end it")
    assert e.value.code == 75


def test_work_that_was_begun_is_finished() -> None:
    stopped, done = threading.Event(), []
    with pytest.raises(Preempted), Preemption() as run:
        with run.finishing(stopped):
            send()
            done.append(stopped.is_set())
        pytest.fail("more is begun")
    assert done == [True]


def test_a_second_signal_ends_it_at_once() -> None:
    with pytest.raises(Preempted), Preemption() as run, run.finishing(threading.Event()):
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        pytest.fail("the signal did not end it")


def test_work_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "GRACE", 0.1)
    begun = time.monotonic()
    with pytest.raises(Preempted), Preemption() as run, run.finishing(threading.Event()):
        send()
        time.sleep(20)
    assert time.monotonic() - begun < 10


def test_tidying_up_is_not_interrupted() -> None:
    tidied = False
    with pytest.raises(Preempted), preemptible():
        try:
            send()
        finally:
            send()
            tidied = True
    assert tidied


def test_what_fails_after_a_signal_is_its_doing() -> None:
    """An engine, which got it too, is gone."""
    with pytest.raises(Preempted) as e, Preemption() as run, run.finishing(threading.Event()):
        send()
        raise ScoreError("every engine has ended")
    assert isinstance(e.value.__cause__, ScoreError)
    with pytest.raises(ScoreError), Preemption() as run, run.finishing(threading.Event()):
        raise ScoreError("every engine has ended")


def test_a_block_inside_another_is_part_of_it() -> None:
    with preemptible() as outer:
        with preemptible() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer._handle


def test_in_a_thread_signals_stay_with_the_main_one() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with preemptible():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
