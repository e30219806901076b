"""The journal beside a half-written file: which units of work are in it, so that an interrupted run can go on.

One JSON object a line. The first line says which file this is about; then a line for every finished unit, and now and
then a line `{"synced": true}`: everything above it was forced to the disk. A killed process loses nothing that it had
written; a machine that lost power may have lost what was not synced, so a journal from an earlier boot counts only up
to its last such line.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .strict_json import parse_object

_SYNC_EVERY = 30.0  # seconds between forced writes: the most that a power failure costs
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class JournalHead:
    """What a journal belongs to: `fingerprint` of the input and options, digest of the header, file size in bytes."""

    fingerprint: str
    header_sha256: str
    size: int

    def difference(self, line: dict[str, Any]) -> str | None:
        """Say why a journal's first line is about other work, or None if it is about this."""
        if line.get("lowbit_journal") != 1:
            return "its journal is damaged or of another version"
        if line.get("fingerprint") != self.fingerprint:
            return "it was begun from another input or with other options"
        if line.get("header_sha256") != self.header_sha256 or line.get("size") != self.size:
            return "it was begun for other tensors"
        return None


def boot_id() -> str | None:
    """Return a name of this run of the machine, or None where the system has none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None


def _parse_lines(raw: bytes) -> list[dict[str, Any]]:
    """Return the sound lines from the top; a torn last line, and all that follows a damaged one, is left out."""
    parsed = map(_parse_line, raw.split(b"\n")[:-1])
    return [line for line in itertools.takewhile(lambda line: line is not None, parsed) if line is not None]


def _parse_line(text: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(text)
    except ValueError:
        return None


def load_journal(path: Path, head: JournalHead) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the finished units of an interrupted run with their records, and a reason when the journal cannot be used.

    Raises:
        OSError: there is no journal, or it cannot be read.
    """
    lines = _parse_lines(path.read_bytes())
    reason = head.difference(lines[0]) if lines else "its journal is damaged"
    if reason:
        return {}, reason
    same_boot = lines[0].get("boot_id") is not None and lines[0]["boot_id"] == boot_id()
    units = lines[1:]
    if not same_boot:
        synced = [number for number, line in enumerate(units) if line.get("synced") is True]
        units = units[: synced[-1]] if synced else []
    done: dict[str, dict[str, Any]] = {}
    for line in units:
        if line.get("synced") is True:
            continue
        unit, record = line.get("unit"), line.get("record")
        if not isinstance(unit, str) or not isinstance(record, dict) or not _names_tensors(record):
            return {}, "its journal is damaged"
        done[unit] = record
    return done, None


def _names_tensors(record: dict[str, Any]) -> bool:
    names = record.get("tensors")
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


class Journal:
    """A journal being written. Every line goes to the system in one call, so a killed process loses no finished line.

    The whole file is written anew at the start, from `records`: what an earlier run may have left torn is gone. With
    `records_synced`, those are known to be on the disk.
    """

    def __init__(
        self, path: Path, head: JournalHead, records: dict[str, dict[str, Any]], *, records_synced: bool
    ) -> None:
        first: dict[str, Any] = {
            "lowbit_journal": 1,
            "fingerprint": head.fingerprint,
            "header_sha256": head.header_sha256,
            "size": head.size,
            "boot_id": boot_id(),
        }
        lines = [first, *({"unit": unit, "record": record} for unit, record in records.items())]
        if records_synced:
            lines.append({"synced": True})
        fresh = path.with_name(path.name + ".new")
        self._fd = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
        )
        try:
            for line in lines:
                self._append(line)
            fresh.replace(path)
        except BaseException:
            os.close(self._fd)
            fresh.unlink(missing_ok=True)
            raise
        self._synced_at = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        data = memoryview(json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]

    def append(self, unit: str, record: dict[str, Any]) -> None:
        """Add a finished unit."""
        self._append({"unit": unit, "record": record})

    def sync(self, sync_data: Callable[[], None], *, now: bool = False) -> None:
        """If it is time (or `now`), force the data to the disk by `sync_data` and note that in the journal."""
        if not now and time.monotonic() - self._synced_at < _SYNC_EVERY:
            return
        sync_data()
        self._append({"synced": True})
        os.fsync(self._fd)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close the journal; the file stays."""
        os.close(self._fd)
