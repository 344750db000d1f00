"""What a file is by its name, what it is by its first bytes, and which names hold no data."""

from __future__ import annotations

import os

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
}
KNOWN = (
    ".parquet, .jsonl, .ndjson, .json, .csv, .tsv, .arrow, .txt, .text (all but Parquet and Arrow also .gz, .zst, .bz2 "
    "or .xz)"
)
# Files that are beside data and hold none, whatever their extension.
BESIDE_DATA = ("readme", "license", "licence", "notice", "changelog", "citation")
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HEAD_BYTES = 64
_MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    **{bytes([0x50 + n]) + b"\x2a\x4d\x18": "zstd data" for n in range(16)},  # a frame to skip, as pzstd begins with
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\x00": "xz data",
    b"]\x00\x00": "lzma data",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "lz4 data",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"version https://git-lfs": "a Git LFS pointer, which holds no data",
}
_STORED = {"gzip": ("gzip data",), "zstd": ("zstd data",), "bzip2": ("bzip2 data",), "xz": ("xz data", "lzma data")}
_NAMES = {"parquet": "Parquet", "arrow": "Arrow", "json": "JSON lines", "csv": "CSV", "text": "text"}


def split_extension(name: str) -> tuple[str, str | None]:
    """(lower-case extension without the compression's, the compression): ``a.JSONL.gz`` gives (".jsonl", "gzip")."""
    base, extension = os.path.splitext(name.lower())
    if extension in COMPRESSIONS:
        return os.path.splitext(base)[1], COMPRESSIONS[extension]
    return extension, None


def format_of(name: str) -> str | None:
    """``parquet``, ``json``, ``csv``, ``arrow`` or ``text`` by the file's extension; None for any other file."""
    extension, compression = split_extension(name)
    found = FORMATS.get(extension)
    return None if compression and found in ("parquet", "arrow") else found


def why_passed_over(name: str) -> str | None:
    """Why a file of a directory is not read, None for one that is.

    ``""`` for a file that nobody takes for data: a README.md, a hidden file without the extension of a data format.
    """
    *_, base = parts = name.split("/")
    like_data = any(f".{part}" in FORMATS for part in base.lower().split(".")[1:])
    if any(part.startswith((".", "_")) for part in parts):
        return "hidden or beginning with _" if like_data else ""
    if base.lower() in METADATA or base.lower().split(".")[0] in BESIDE_DATA:
        return "a readme or metadata by its name" if like_data else ""
    return None if format_of(name) is not None else "of no known format"


def mismatch(name: str, head: bytes) -> str | None:
    """What is wrong with a file that begins with ``head`` (``HEAD_BYTES`` of it), given its name; None if nothing."""
    kind = str(format_of(name))
    extension, compression = split_extension(name)
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if not head:
        return None
    if compression is not None:
        stored = _STORED[compression]
        if found in stored or (compression == "xz" and head[:1] == b"]"):
            return None
        return f"its name says {compression}, but it is {found or f'not {stored[0]}'}"
    if kind in ("parquet", "arrow"):
        wanted = "a Parquet file" if kind == "parquet" else "an Arrow file"
        if found == wanted or (kind == "arrow" and found is None):  # an Arrow stream has no such bytes
            return None
        return f"its name says {_NAMES[kind]}, but it is {found or 'something else: it does not begin with PAR1'}"
    if found is not None:
        return f"its name says {_NAMES[kind]} ({extension}), but it is {found}"
    return None
