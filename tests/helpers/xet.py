"""The content store that Xet clients of the tests' Hub write to: a folder, kept by the client library itself.

``hf_xet`` takes ``local://FOLDER`` for the address of a store. It then cuts files into chunks, leaves out those that
are there, and writes the rest as it would send them. What is missing of a Hub is done here: finding a file by its
SHA-256, which is what a commit names it by, in the metadata ("shards") that the client registers, and putting its bytes
together.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

HEADER, ENTRY = 48, 48
LAST = b"\xff" * 32
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30


class XetStore:
    """Files by content, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"local://{folder}"
        folder.mkdir(parents=True, exist_ok=True)

    def stored_bytes(self) -> int:
        """Bytes of the chunks that are kept, as compressed as they are."""
        return sum(p.stat().st_size for p in self.folder.glob("xet/xorbs/xorbs/default.*") if p.suffix != ".tagset")

    def find(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of the file with this SHA-256, or None."""
        for shard in sorted(self.folder.glob("xet/xorbs/shards/*.mdb")):
            found = files_of(shard.read_bytes()).get(sha256)
            if found:
                return found
        return None

    def restore(self, sha256: str, target: Path) -> None:
        """Write the file with this SHA-256, from its chunks, by the client library."""
        import hf_xet

        found = self.find(sha256)
        if not found:
            raise KeyError(sha256)
        session = hf_xet.XetSession()
        info = hf_xet.XetFileInfo(*found)
        with session.new_file_download_group(
            endpoint=self.address, token="none", token_expiry_unix_secs=int(time.time()) + 3600
        ) as group:
            group.start_download_file(info, str(target))


def files_of(shard: bytes) -> dict[str, tuple[str, int]]:
    """SHA-256 -> (Xet hash, size) of the files that a shard describes.

    A shard starts with a header of 48 bytes; then come, for each file, a header (hash, flags, number of terms), its
    terms, as many records of verification, and one of metadata that holds the SHA-256; all of 48 bytes.
    """
    found, at = {}, HEADER
    while shard[at : at + 32] != LAST:
        name, flags, terms = shard[at : at + 32], *struct.unpack_from("<II", shard, at + 32)
        first = at + ENTRY
        size = sum(struct.unpack_from("<I", shard, first + ENTRY * n + 36)[0] for n in range(terms))
        at = first + ENTRY * terms * (2 if flags & HAS_VERIFICATION else 1)
        if flags & HAS_METADATA:
            found[_hex(shard[at : at + 32])] = (_hex(name), size)
            at += ENTRY
    return found


def _hex(data: bytes) -> str:
    """A hash as text: four little-endian numbers of 64 bits."""
    return "".join(f"{n:016x}" for n in struct.unpack("<4Q", data))
