"""A chat template that does not end costs one row some seconds, and no run its life."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from entrodrop_prep.errors import RowError
from entrodrop_prep.scoring import chat, time_limit
from entrodrop_prep.scoring.time_limit import within
from entrodrop_prep.scoring.tokenize import Encoder, RowFormat
from helpers.tokenizers import byte_bpe

ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Where nothing interrupts the work, the test does."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("nothing interrupted it"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def spin() -> None:
    while True:
        sum(range(100))


def swallow() -> None:
    while True:
        with contextlib.suppress(Exception):
            spin()


@pytest.mark.parametrize("call", [spin, swallow, lambda: [spin() for _ in iter(int, 1)]])
def test_what_takes_too_long_is_interrupted(call: Any) -> None:
    with pytest.raises(TimeoutError, match=r"it took longer than 0\.2 s"):
        within(0.2, call)
    assert within(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(5, lambda: {}[1])


def test_nothing_is_raised_afterwards() -> None:
    """Calls that end at about the time at which they would be interrupted."""

    def work(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    for i in range(8):
        with contextlib.suppress(TimeoutError):
            within(0.1, lambda i=i: work(0.08 + i * 0.012))  # type: ignore[misc]
        work(0.01)


def test_what_comes_too_late_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends before it hears that it took too long."""
    told: list[tuple[int, Any]] = []

    def work() -> None:
        while not told:
            sum(range(100))

    monkeypatch.setattr(time_limit, "_raise_in", lambda *what: told.append(what))
    within(0.1, work)
    assert told[0][1] is not None
    assert told[-1][1] is None
    assert {thread for thread, _ in told} == {threading.get_ident()}


def test_a_fork_has_the_limit_too() -> None:
    within(5, lambda: None)  # whose thread a fork does not have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            within(0.2, spin)
        except TimeoutError:
            os._exit(7)
        os._exit(8)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_each_thread_has_its_own_limit() -> None:
    results: list[Any] = []

    def one(seconds: float, call: Any) -> None:
        try:
            results.append(within(seconds, call))
        except TimeoutError:
            results.append("late")

    threads = [
        threading.Thread(target=one, args=(0.3, spin)),
        threading.Thread(target=one, args=(30, lambda: time.sleep(0.6))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results, key=str) == [None, "late"]


def test_sleep_is_not_work() -> None:
    """A process that was stopped for a while is not to blame."""
    within(0.1, lambda: time.sleep(0.4))


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS + PLAIN,
        "{% macro f(x) %}{% for i in range(99999) %}{{ f(x + 1) if x < 9 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_template_that_does_not_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.3)
    tokenizer = byte_bpe()
    tokenizer.chat_template = template
    with pytest.raises(chat.SlowTemplate, match=r"takes longer than 0\.3 s to render one chat; give another one"):
        chat.render(tokenizer, [{"role": "user", "content": "x"}], {})


def test_a_row_for_which_it_does_not_end_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}" + PLAIN
    encoder = Encoder(tokenizer, RowFormat("messages", ("messages",)), append_eos=True, chat_template_kwargs=None)

    def row(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "y z"}]}

    encoder.encode([row("good")])  # the first one compiles the template
    monkeypatch.setattr(chat, "RENDER_SECONDS", 1.0)

    good, bad, again = encoder.encode([row("good"), row("bad"), row("good")])
    assert isinstance(bad, str)
    assert "the chat template takes longer than 1 s" in bad
    assert not isinstance(good, str)
    assert not isinstance(again, str)
    assert (good.input_ids == again.input_ids).all()


def test_powers_are_refused_before_anything_is_computed() -> None:
    tokenizer = byte_bpe()
    for template in (
        "{{ 10 ** 10 ** 10 }}",
        "{% set x = messages|length ** 999999999 %}",
        "{% if 2**9999999999 %}{% endif %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(RowError, match="raises a number to a power"):
            chat.render(tokenizer, [{"role": "user", "content": "x"}], {})
    tokenizer.chat_template = (
        "{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(**{'a': 1, 'b': 2}) }} ** {# 2 ** 3 #}"
        "{{ f(1, **{'b': '**'}) }}"
    )
    assert chat.render(tokenizer, [{"role": "user", "content": "x"}], {}) == "12 ** 1**"


def test_a_template_that_takes_all_memory_or_all_depth() -> None:
    tokenizer = byte_bpe()
    for template in ("{{ 'x' * (999999 * 999999 * 99) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        tokenizer.chat_template = template
        with pytest.raises(RowError, match=r"cannot render it: (Memory|Recursion|Overflow)Error"):
            chat.render(tokenizer, [{"role": "user", "content": "x"}], {})
