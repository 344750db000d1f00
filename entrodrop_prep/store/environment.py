"""Versions that may change what a run stores, beside those that a backend names."""

from __future__ import annotations

import platform

from entrodrop_prep import __version__


def host_environment() -> dict[str, str]:
    """Name -> version: this program, Python and what writes the files."""
    import numpy as np
    import pyarrow as pa

    return {
        "entrodrop_prep": __version__,
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
    }
