"""Rewriting a checkpoint: pieces of work that each make some of the output's tensors, streamed into its files.

Conversion, dequantization and migration differ only in their pieces. What is here is common: worker threads with
bounded memory, reading back what was written, the journals that let an interrupted run go on, the files that travel
along, and that nothing appears at the target before all of it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import PlanError, WriteError

from .dialects.base import Read, TensorSpec
from .output import OutputFile, Staging
from .pipeline import MEMORY_BUDGET, Progress, Unit, run_units
from .source import Component, Source
from .writer import CheckpointWriter

COPY_BYTES = 16 << 20  # a plain tensor is copied in pieces of this size
BATCH_BYTES = 4 << 20  # small plain tensors are copied together, up to this size


@dataclass(frozen=True)
class Made:
    """What a piece made: its tensors, JSON data to report, and a check of what the file gives back.

    `slices`: further tensors, which are too large to be made as a whole: what stands at 0, 1, 2 ... of their first
    axis, made one by one and before all else is looked at. What their checks return does not count.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Read], dict[str, Any]] | None = None
    slices: Iterable[Made] = ()


@dataclass(frozen=True)
class Piece:
    """Work that makes the tensors `specs` of the output file `file` by calling `make`.

    `name` is its own in the run. `size`: bytes that it reads, for the progress. `memory`: bytes that it holds at most.
    """

    name: str
    file: str
    specs: dict[str, TensorSpec]
    size: int
    memory: int
    make: Callable[[], Made]


@dataclass(frozen=True)
class Copy:
    """Tensors of a component that are copied as they are into the output file `file`; `specs` are theirs."""

    name: str
    file: str
    component: Component
    specs: dict[str, TensorSpec]

    @property
    def size(self) -> int:
        """Their bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def memory(self) -> int:
        """The most bytes of them that are in memory, with what is read back."""
        return 2 * max(min(spec.nbytes, _piece_bytes(spec)) for spec in self.specs.values())


@dataclass(frozen=True)
class Settings:
    """How a run is done; nothing here changes a byte of the result.

    But `memory`, where it has room for fewer pieces than there are workers: sums in several threads may end otherwise.
    """

    jobs: int | None = None
    resume: bool = True
    verify: bool = True
    progress: Progress | None = None
    memory: int = MEMORY_BUDGET


@dataclass
class Rewritten:
    """What a run did: the record of each piece by its name, and how many of them an interrupted run had done."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed: int = 0


def batch_copies(component: Component, keys: Iterable[str], file_of: Callable[[str], str]) -> list[Copy]:
    """Copies of plain tensors, small neighbours together. `file_of` gives the output file of a key."""
    batches: list[tuple[str, dict[str, TensorSpec]]] = []
    size = 0
    for key in keys:
        info, file = component.tensors[key], file_of(key)
        if not batches or batches[-1][0] != file or size + info.nbytes > BATCH_BYTES:
            batches.append((file, {}))
            size = 0
        batches[-1][1][key] = TensorSpec(info.dtype, info.shape)
        size += info.nbytes
    return [Copy(f"copy {next(iter(specs))}", file, component, specs) for file, specs in batches]


def rewrite(
    source: Source,
    staging: Staging,
    pieces: Sequence[Piece | Copy],
    metadata: Mapping[str, Mapping[str, str]],
    *,
    fingerprint: str,
    settings: Settings,
) -> Rewritten:
    """Run all pieces and put the result in place; on any error the target stays as it was.

    `metadata`: the header metadata of each output file. `fingerprint` names input and options: work of an interrupted
    run with another one is not used. An interrupt, or an error of the system, keeps the work done for a later run.

    Raises:
        PlanError: two output tensors with one name.
        CheckpointError: reading or writing failed, or what was read back differs from what was written.
    """
    entries = _entries(pieces)
    result = Rewritten()
    files = [OutputFile(name, entries[name], dict(metadata.get(name, {}))) for name in sorted(entries)]
    with staging.open(files, fingerprint, resume=settings.resume) as writers:
        waiting: list[Unit] = []
        done = 0
        for piece in pieces:
            writer = writers[piece.file]
            if piece.name in writer.done:
                result.records[piece.name] = writer.done[piece.name]
                done += piece.size
            else:
                places = staging.orders.get(piece.file, {})
                work = _Work(source, piece, writer, result.records, settings.verify, places)
                waiting.append(Unit(piece.name, piece.size, piece.memory, work))
        result.resumed = len(pieces) - len(waiting)
        total = sum(isinstance(piece, Piece) for piece in pieces)
        run_units(
            waiting, jobs=settings.jobs, budget=settings.memory, progress=settings.progress, done=done, total=total
        )
    return result


def _entries(pieces: Sequence[Piece | Copy]) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each output file, in the order of the pieces."""
    entries: dict[str, dict[str, TensorSpec]] = {}
    for piece in pieces:
        into = entries.setdefault(piece.file, {})
        for key, spec in piece.specs.items():
            if key in into:
                raise PlanError(f"{piece.file}: two output tensors would be named {key!r}; keep one of their layers")
            into[key] = spec
    return entries


@dataclass(frozen=True)
class _Work:
    """Running one piece: make, write, read back, compare, check, commit."""

    source: Source
    piece: Piece | Copy
    writer: CheckpointWriter
    records: dict[str, dict[str, Any]]
    verify: bool
    places: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self) -> None:
        found = self._copy(self.piece) if isinstance(self.piece, Copy) else self._make(self.piece)
        record = {"tensors": list(self.piece.specs), **found}
        self.writer.commit(self.piece.name, record)
        self.records[self.piece.name] = record

    def _make(self, piece: Piece) -> dict[str, Any]:
        made = piece.make()
        for index, part in enumerate(made.slices):
            self._make_slice(index, part)
        for key, tensor in made.tensors.items():
            self._write(key, tensor)
        if not self.verify:
            return made.record
        back: dict[str, Tensor] = {}
        for key, tensor in made.tensors.items():
            back[key] = self._read_back(key)
            self._compare(key, tensor, back[key])
        made.tensors.clear()  # from here on only what the file holds counts
        return {**made.record, **(made.check(back.__getitem__) if made.check is not None else {})}

    def _make_slice(self, index: int, part: Made) -> None:
        for key, tensor in part.tensors.items():
            self.writer.write_rows(key, index, tensor.unsqueeze(0))
        if not self.verify:
            return
        back: dict[str, Tensor] = {}
        for key, tensor in part.tensors.items():
            back[key] = self.writer.read_back_rows(key, index, index + 1)[0]
            self._compare(key, tensor, back[key])
        part.tensors.clear()
        if part.check is not None:
            part.check(back.__getitem__)

    def _copy(self, piece: Copy) -> dict[str, Any]:
        for key, spec in piece.specs.items():
            rows = max(1, _piece_bytes(spec) * spec.shape[0] // max(spec.nbytes, 1)) if spec.shape else 1
            if not spec.shape or rows >= spec.shape[0] or key in self.places:
                tensor = self.source.read(piece.component, key)
                self._write(key, tensor)
                if self.verify:
                    self._compare(key, tensor, self._read_back(key))
                continue
            for start in range(0, spec.shape[0], rows):
                stop = min(start + rows, spec.shape[0])
                tensor = self.source.read_rows(piece.component, key, start, stop)
                self.writer.write_rows(key, start, tensor)
                if self.verify:
                    self._compare(key, tensor, self.writer.read_back_rows(key, start, stop))
        return {}

    def _write(self, key: str, tensor: Tensor) -> None:
        if key in self.places:
            tensor = torch.empty_like(tensor).index_copy_(0, self.places[key], tensor)
        self.writer.write(key, tensor)

    def _read_back(self, key: str) -> Tensor:
        back = self.writer.read_back(key)
        return back[self.places[key]] if key in self.places else back

    def _compare(self, key: str, written: Tensor, back: Tensor) -> None:
        if not _same_bytes(written, back):
            raise WriteError(
                f"{self.writer.target}: tensor {key!r} reads back different from what was written; the disk or the "
                "memory is faulty, so nothing was put in place"
            )


def _piece_bytes(spec: TensorSpec) -> int:
    """How many bytes of a tensor are copied at a time: whole rows, at least one."""
    row = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else spec.nbytes
    return max(row, COPY_BYTES // max(row, 1) * row)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes: by eights where they can, six times as fast."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    if all(bytes_.numel() % 8 == 0 and bytes_.storage_offset() % 8 == 0 for bytes_ in raw):
        raw = [bytes_.view(torch.int64) for bytes_ in raw]
    return torch.equal(*raw)
