"""Proving that a directory is what its manifest says, and that its masks follow from the scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrodrop_prep.config.names import is_repo_id
from entrodrop_prep.errors import EntrodropError, IntegrityError, OutputError
from entrodrop_prep.export import derived
from entrodrop_prep.export.epoch import Part, ShardCounts
from entrodrop_prep.export.identity import config_of
from entrodrop_prep.export.job import Job, open_job
from entrodrop_prep.export.provenance import source_summary, summary_of
from entrodrop_prep.masking.histogram import histogram_summary
from entrodrop_prep.masking.sources import EVAL, SOURCE, compared_with, named_path
from entrodrop_prep.store import manifest
from entrodrop_prep.store.digest import ContentDigest
from entrodrop_prep.store.disk import scratch
from entrodrop_prep.store.layout import VALIDATION
from entrodrop_prep.store.locks import reading_lock
from entrodrop_prep.store.parallel import in_order
from entrodrop_prep.store.schema import MASKED, family
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.store.shards import local_directory, read_footer
from entrodrop_prep.verification.masked import figures_of, masked_findings, sources_of, title
from entrodrop_prep.verification.scored import scored_findings


@dataclass
class Report:
    """``notes`` say what was proved and what was not; ``findings`` say what does not hold."""

    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def kind_of(directory: Path) -> str:
    """The schema's name, by the manifest, else by what is there. Raises IntegrityError."""
    if not os.path.isdir(directory):
        raise IntegrityError("no such directory", where=str(directory), fix="give a scored or a masked directory")
    schema = manifest.peek_schema(directory)
    if schema is None:
        manifest.refuse_unfinished(directory)
        schema = (manifest.read_state(directory) or {}).get("schema")
    if schema is None:
        raise IntegrityError(
            f"it has no {manifest.NAME}", where=str(directory), fix="give a scored or a masked directory"
        )
    return str(schema)


def verify(
    directory: str,
    against: str | Sequence[str] | None = None,
    revision: str | None = None,
    against_scores: Sequence[str] = (),
) -> Report:
    """Check a scored or a masked directory; ``against`` is the scored directory that a masked one was made from.

    Where a masked dataset on the Hub comes with its scores, the masks are proved from these.

    Args:
        directory: the directory, or ``USER/NAME`` on the Hub; a path that exists here wins.
        against: the scored directory, or a dataset on the Hub at its default branch. For a mixture, one
            ``NAME=SCORED`` for each source; ``eval=SCORED`` proves the validation rows.
        revision: branch, tag or commit of ``directory`` on the Hub; default its default branch.
        against_scores: the scores that those of ``against`` were compared with, as ``materialize`` was given them.

    Returns:
        Findings, everything that does not hold, and notes, such as what was not checked.

    Raises:
        EntrodropError: there is nothing to check, another run is writing there, or TMPDIR has no room.
    """
    report = Report()
    path, scores, here = _found(directory, revision, report, with_scored=against is None)
    if scores:
        against = scores
    elif against is not None:
        against = [_here(text, report) for text in ([against] if isinstance(against, str) else against)]
    compared = [_here(text, report) for text in against_scores]
    others = [local_directory(name) for text in (*(against or ()), *compared) for name in {text, named_path(text)[1]}]
    with reading_lock(path, *others):
        _check(path, against, compared, report, here=here)
    report.notes.append(f"FAILED: {len(report.findings)} findings" if report.findings else f"OK: verified {directory}")
    return report


def _check(path: Path, against: list[str] | None, compared: list[str], report: Report, *, here: bool) -> None:
    """Check a directory; one that is not of the Hub says which layouts are missing: no push brings any there."""
    if family(kind_of(path)) == "scored":
        if against is not None:
            raise IntegrityError("a scored directory has no masks to check", where=str(path), fix="leave out --against")
        _collect(report, scored_findings(path, report.notes))
    else:
        _collect(report, masked_findings(path, report.notes))
        report.notes.extend(
            f"layout {layout} is not here, as a push leaves it out: `materialize --layout {layout}` derives it"
            for layout in (derived.absent(path, manifest.read(path, MASKED)) if here and not report.findings else ())
        )
        if against is None:
            report.notes.append(
                "masks not checked: add --against SCORED to prove them, the thresholds and the entropies"
            )
        elif not report.findings:
            _collect(report, _masks(path, against, compared, report))


def _found(
    name: str, revision: str | None, report: Report, *, with_scored: bool
) -> tuple[Path, list[str] | None, bool]:
    """The directory that a name means, downloaded if it is on the Hub; the scores that were published with it; and
    whether it was here."""
    from entrodrop_prep.store import published as fetch

    if not fetch.is_published(name, revision):
        path = local_directory(name)
        if is_repo_id(name):
            report.notes.append(f"{name}: the directory here, not a dataset on the Hub")
        return path, None, True
    got = fetch.fetch(name, revision, with_scored=with_scored)
    report.notes.append(
        f"{name}: the dataset on the Hub at commit {got.commit}, as it is in the cache (`hf cache verify {name} "
        "--repo-type dataset` compares the two)"
    )
    if got.scored is None:
        return got.directory, None, False
    identity = manifest.read(got.directory, MASKED)["identity"]
    if "sources" in identity or compared_with(identity):
        return got.directory, None, False
    return got.directory, [str(got.scored)], False


def _here(text: str, report: Report) -> str:
    """``[NAME=]SCORED`` with a directory for what is on the Hub."""
    name, path_ = named_path(text)
    if os.path.lexists(text):
        return text
    path = str(_found(path_, None, report, with_scored=False)[0])
    return f"{name}={path}" if name else path


def _collect(report: Report, findings: Iterator[str]) -> None:
    """Add findings; an error on the way is the last of them. No room for temporary files is no finding."""
    try:
        report.findings.extend(findings)
    except OutputError:
        raise
    except EntrodropError as e:
        report.findings.append(str(e))


def _masks(path: Path, against: list[str], compared: list[str], report: Report) -> Iterator[str]:
    """Make every shard again from the scores and compare what it holds."""
    described = manifest.read(path, MASKED)
    given, validation = given_sources(path, described, against)
    others = given_compared(path, described["identity"], compared)
    identity = dict(described["identity"])
    proved = VALIDATION not in identity or validation is not None
    if not proved:
        del identity[VALIDATION]
        report.notes.append("validation rows not checked: add --against eval=SCORED to prove them")
    wanted = {n: s["scored"] for n, s in identity.get("sources", {}).items()} or {SOURCE: identity["scored"]}
    directories = [(given[name], content) for name, content in wanted.items()]
    directories += [(others[name], content) for name, content in compared_with(identity).items()]
    for path_, content in [*directories, *([(validation, identity[VALIDATION])] if validation else [])]:
        found = ScoredDataset(local_directory(path_))
        if found.content_digest != content:
            yield f"{path}: it was not made from {found.directory}: the scores' content digests differ"
            return
    job = open_job(config_of(described, given, others, eval=validation, out=str(path)))
    for scored in job.directories:
        scored.check()
    for line in manifest.differences(identity, job.identity):
        yield f"{path}: its recipe does not give its identity: {line}"
    job.plan(e["epoch"] for e in described["epochs"])
    with scratch() as tmp:
        job.open(tmp)
        yield from _figures(path, described, job)
        recorded = figures_of(described)
        parts = job.parts(e["epoch"] for e in described["epochs"])
        every = [(part, shard) for part in parts for shard in range(part.layout.shards)]
        made = in_order(lambda one: _content(job, *one), every, job.jobs)
        for part in parts:
            yield from _part(path, described, job, part, made, recorded.get(part.folder, {}))
    report.notes.append(f"masks made again from {', '.join(given.values())} and compared")


def _figures(path: Path, described: dict[str, Any], job: Job) -> Iterator[str]:
    """What the manifest says of the rows before they are masked."""
    rows, validation = job.rows, job.validation_rows
    if described.get("entropy_histogram", recorded := histogram_summary(rows.columns.facts["spread"])) != recorded:
        yield f"{path}: its entropy_histogram is not that of the scores"
    yield from _origins(path, described, job)
    if described["tau_nats"] != rows.threshold_summary:
        yield f"{path}: its threshold (tau_nats) is not that of the scores"
    if described["rows_without_loss"] != rows.rows_without_loss:
        yield f"{path}: its rows_without_loss are not those of the scores"
    if validation and described[VALIDATION]["rows_without_loss"] != validation.rows_without_loss:
        yield f"{path}: its rows_without_loss of the validation rows are not those of their scores"


def _origins(path: Path, described: dict[str, Any], job: Job) -> Iterator[str]:
    """What the manifest says of the scores is what they say of themselves, where its files do not prove it.

    Scores of the same content may have been made again, by another version of a library.
    """
    recorded = sources_of(described)
    now = {s.name: source_summary(s, named=job.sources.named) for s in job.sources.all}
    if job.eval:
        now[VALIDATION] = summary_of(job.eval)
        recorded[VALIDATION] = {**described[VALIDATION], "content_digest": described[VALIDATION]["scored"]}
        recorded[VALIDATION] = {k: v for k, v in recorded[VALIDATION].items() if k in now[VALIDATION]}
    if recorded == now:
        return
    infos = [read_footer(path / e["file"]).info for e in described["files"] if "rows" in e]
    known = {s["name"] for info in infos for s in info.get("provenance", []) if "described" in s}
    for name in now:
        if name not in known and recorded[name] != now[name]:
            lines = manifest.differences(recorded[name], now[name]) or ["it leaves something out"]
            yield f"{path}: the manifest is not what the scores of {name} say: {'; '.join(lines)}"


def _content(job: Job, part: Part, shard: int) -> tuple[str, ShardCounts]:
    """Make a file's rows again: their content digest, and what masking did to them."""
    content, counts = ContentDigest(job.schema), job.counts(part)
    for table in job.tables(part, shard, counts):
        content.update(table)
    return content.hexdigest(), counts


def _part(
    path: Path,
    described: dict[str, Any],
    job: Job,
    part: Part,
    made: Iterator[tuple[str, ShardCounts]],
    recorded: dict[str, Any],
) -> Iterator[str]:
    """Compare the files of one part with those ``made`` again; ``recorded`` are its figures in the manifest."""
    listed = {e["file"]: e for e in described["files"]}
    counts = job.counts(part)
    for shard in range(part.layout.shards):
        (content, more), name = next(made), part.name(shard)
        counts.merge(more)
        if name not in listed:
            yield f"{path / name}: the file is missing"
        elif listed[name]["content_digest"] != content:
            yield f"{path / name}: its masks are not those of the recipe"
    figures: dict[str, Any] = {**counts.values, "rows": counts.rows}
    figures |= {"rate_min": counts.rates[0], "rate_max": counts.rates[1]}
    if counts.sources:
        figures["sources"] = counts.sources
    if part.epoch is None:
        kept = ("rows", "documents", "tokens", "labels_left", "sources")
        figures = {n: v for n, v in figures.items() if n in kept}
    figures |= job.beside(part, counts.rows, counts.values["tokens"])
    wrong = ", ".join(name for name, value in figures.items() if recorded.get(name) != value)
    if wrong:
        yield f"{path}: the manifest's figures of {title(part.folder)} are not those of the masks ({wrong})"


def given_compared(path: Path, identity: dict[str, Any], given: Sequence[str]) -> dict[str, str]:
    """Name -> directory of the scores that each source's were compared with.

    Raises IntegrityError where they are not one for each such source.
    """
    wanted = compared_with(identity)
    found = dict(named_path(text) if "sources" in identity else (SOURCE, text) for text in given)
    if set(found) != set(wanted) or len(given) != len(wanted):
        each = " NAME=SCORED2 for each source" if "sources" in identity else " SCORED2"
        raise IntegrityError(
            f"{len(wanted)} of its sources were compared with other scores, and --against-scores names {len(given)}",
            where=str(path),
            fix=f"give --against-scores{each}" if wanted else "leave out --against-scores",
        )
    return {name: found[name] for name in wanted if found[name] is not None}


def given_sources(path: Path, described: dict[str, Any], against: list[str]) -> tuple[dict[str, str], str | None]:
    """Name -> directory of each source, and the directory of the validation rows if it was given.

    Raises IntegrityError where they are not one for each source.
    """
    identity = described["identity"]
    pairs = [named_path(text) for text in against]
    validation = next((path_ for name, path_ in pairs if name == EVAL and VALIDATION in identity), None)
    if "sources" not in identity:
        rest = [text for text, (name, _) in zip(against, pairs, strict=True) if name != EVAL or not validation]
        if len(rest) != 1:
            raise IntegrityError(
                f"{len(rest)} scored directories to prove the masks from", where=str(path), fix="give one --against"
            )
        return {SOURCE: rest[0]}, validation
    given = {name or text: path_ for text, (name, path_) in zip(against, pairs, strict=True) if name != EVAL}
    wanted = set(identity["sources"])
    if set(given) != wanted or len(against) != len(given) + bool(validation):
        raise IntegrityError(
            f"its sources are {', '.join(sorted(wanted))}, --against names {', '.join(sorted(given)) or 'none'}",
            where=str(path),
            fix="give one --against NAME=SCORED for each source",
        )
    return given, validation
