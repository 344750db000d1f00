"""A directory that several files push."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pushes import masked_directory


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of 40 rows in two epochs, and beside them their scores. Never written to by a test."""
    return masked_directory(tmp_path_factory.mktemp("data"), rows=40, epochs=2)
