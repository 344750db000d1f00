"""What is shown holds no secret of a URL and nothing that acts on a terminal."""

from __future__ import annotations

import logging

import pytest

from entrodrop_prep.errors import SourceError
from entrodrop_prep.terminal.amounts import Amount, size_text, time_text
from entrodrop_prep.terminal.text import one_line, printable, shown_url, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:S3cr3t@127.0.0.1:1/rows.jsonl", "http://127.0.0.1:1/rows.jsonl"),
        ("https://host/rows.jsonl?X-Amz-Signature=S3cr3t&x=1#S3cr3t", "https://host/rows.jsonl?..."),
        ("https://S3cr3t@host", "https://host"),
        ("s3://key:S3cr3t@bucket/x", "s3://bucket/x"),
        ("s3://key:S3/cr3t@bucket/x", "s3://bucket/x"),
        ("http://user:p@S3cr3t:w@host/x", "http://host/x"),
        ("zip://a.jsonl::https://u:S3cr3t@h/z.zip?sig=S3cr3t", "zip://a.jsonl::https://h/z.zip?..."),
        ("simplecache::https://u:S3cr3t@[::1]:80/x", "simplecache::https://[::1]:80/x"),
        ("abfs://c/x.csv?sv=1&sig=S3cr3t", "abfs://c/x.csv?..."),
        ("s3://b/data-?.jsonl", "s3://b/data-?.jsonl"),
        ("hf://datasets/u/n@main/x.jsonl", "hf://datasets/u/n@main/x.jsonl"),
        ("data/a?b=c.jsonl", "data/a?b=c.jsonl"),
    ],
)
def test_urls_lose_what_is_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert without_secrets(f"cannot open ({url}): see '{url}'.") == f"cannot open ({shown}): see '{shown}'."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("evil\u202etxt.exe", "evil\\u202etxt.exe"),
        ("bad-\udcff\u2028", "bad-\\xff\\u2028"),
        (
            "\u00fcml\u00e4ut \u65e5\u672c \u0645\u06cc\u200c\u062e",
            "\u00fcml\u00e4ut \u65e5\u672c \u0645\u06cc\u200c\u062e",
        ),
        ("\U000e0041\x85\x7f", "\\U000e0041\\x85\\x7f"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_is_one_line_and_keeps_the_name_apart_from_the_message() -> None:
    e = SourceError("cannot\n open http://u:S3cr3t@h/x", where="a\nb.jsonl", fix="see\x07 it")
    assert str(e) == "a\\nb.jsonl: cannot open http://h/x; see\\x07 it"
    assert one_line("x\n  y") == "x y"
    assert len(one_line("x" * 10**6 + "; see it")) < 3000
    assert one_line("x" * 10**6 + "; see it").endswith("x; see it")


def test_the_log_is_covered(capsys: pytest.CaptureFixture[str]) -> None:
    from entrodrop_prep.cli import run

    log = logging.getLogger("entrodrop_prep")
    before = log.handlers[:], log.propagate, log.level
    try:
        assert run(["verify", "http://u:S3cr3t@h/\x1b[2J"]) == 2
        log.warning("%s", "https://u:S3cr3t@h/?q=S3cr3t \x1b[2J\nx")
        log.info("%s", "https://u:S3cr3t@h/?q=S3cr3t \x1b[2J\nx")
    finally:
        log.handlers[:], log.propagate, log.level = before
    told = capsys.readouterr()
    assert told.out == "https://h/?... \\x1b[2J\\nx\n"
    assert told.err.splitlines()[1] == "warning: https://h/?... \\x1b[2J\\nx"
    assert "S3cr3t" not in told.err
    assert "\x1b" not in told.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3599.6, "1 h"),
        (7190, "2 h"),
        (86399, "1 d"),
        (95_000, "1 d 2 h"),
    ],
)
def test_times_of_people(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_amounts_of_people() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 2_427_513, 3e12)] == ["0 B", "999 B", "1.0 kB", "2.4 MB", "3.0 TB"]
    assert Amount(1200.0).text() == "1,200"
    assert Amount(1200.0, 0.5).text() == "about 1,200 (600 to 1,800)"
    assert Amount(10.0, 2.0).ends == (0, 30)
