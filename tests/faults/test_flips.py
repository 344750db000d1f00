"""Single bytes changed at random in finished directories and in the loader's cache: each is found, none is used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import EntrodropError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store.locks import LOCK
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.run import verify
from helpers.scored import manifest_of, some_rows, write_scored


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored``, ``masked`` and a loader's ``cache``."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(60, lengths=(2, 30)), rows_per_shard=20, with_id=True)
    layout = ("jsonl", "concatenated")
    config = MaterializeConfig(
        scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2, rows_per_shard=40, layout=layout
    )
    materialize(config)
    load(folder)
    return folder


def load(folder: Path, quantile: float = 0.5) -> object:
    """All rows of two epochs; another quantile looks at what is cached anew."""
    rows = MaskedRows.open(folder / "scored", epochs=2, quantile=quantile, cache_dir=folder / "cache")
    return rows.take(np.arange(len(rows)))


def listed(directory: Path) -> list[Path]:
    """What the manifest covers, and the manifest."""
    described = manifest_of(directory)
    files = [directory / e["file"] for e in (*described["files"], *described.get("derived", []))]
    return [directory / "manifest.json", *files]


def is_found(check: Callable[[], list[str]]) -> bool:
    try:
        return bool(check())
    except EntrodropError:
        return True


def is_refused(use: Callable[[], object]) -> bool:
    try:
        use()
    except EntrodropError:
        return True
    return False


def check_cache(folder: Path, rows: object, quantile: float) -> bool:
    """Whether a damaged cache gives the right rows or none, and none where all of it is looked at."""
    right = is_refused(lambda: load(folder)) or load(folder) == rows
    return right and is_refused(lambda: load(folder, quantile))


def check_scored(scored: Path, empty: Path) -> bool:
    """Whether nothing takes a damaged scored directory."""
    config = MaterializeConfig(scored=str(scored), out=str(empty / "masked"), epochs=1)
    return (
        is_found(lambda: verify(str(scored)).findings)
        and is_refused(lambda: materialize(config))
        and is_refused(lambda: MaskedRows.open(scored, epochs=1, cache_dir=empty / "cache"))
        and not list(empty.rglob("*.parquet"))
    )


def check_flips(folder: Path, count: int, seed: int) -> None:
    """Of every kind of file as many, at any of its bytes."""
    rng = random.Random(seed)
    scored, masked, rows = folder / "scored", folder / "masked", load(folder)
    caches = [p for p in (folder / "cache").rglob("*") if p.is_file() and p.name != LOCK]
    survey = next(p.parent for p in caches if p.parent.name.startswith("survey"))
    for n in range(count):
        path = rng.choice([listed(scored), listed(masked), caches][n % 3])
        before = path.read_bytes()
        at = rng.randrange(len(before))
        path.write_bytes(before[:at] + bytes([before[at] ^ rng.randrange(1, 256)]) + before[at + 1 :])
        where = f"byte {at} of {path.relative_to(folder)}"
        if path.parent == survey:
            assert is_refused(lambda: load(folder)), where
        elif path in caches:
            assert check_cache(folder, rows, 0.5 + 0.1 * seed + n / 20_000), where
        elif masked in path.parents:
            assert is_found(lambda: verify(str(masked)).findings), where
        else:
            assert check_scored(scored, folder / f"empty-{n}"), where
        path.write_bytes(before)
    assert load(folder) == rows
    assert not verify(str(masked), str(scored)).findings


def test_every_flip_is_found(made: Path) -> None:
    check_flips(made, 102, seed=1)


@pytest.mark.faults
def test_a_thousand_flips_are_found(made: Path, record_property: Callable[[str, object], None]) -> None:
    check_flips(made, 1000, seed=2)
    record_property(
        "flips", "1,000 bytes changed at random in a scored and a masked directory and the cache: all found"
    )
