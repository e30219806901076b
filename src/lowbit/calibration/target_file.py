"""The statistics file while it is being made: inputs are added pass by pass, and it appears when all are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.target import check_file_target
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import StatisticsError
from lowbit.solvers.base import Statistics

from .collection import Contents
from .statistics_file import entries_of, header
from .stored import fields_of, output_entries, packed_fields

STATISTICS = "stats.safetensors"  # a name for such a file


class TargetFile:
    """Writes statistics to `path` when they come. Raises `WriteError` at once where no file can be put there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._writer: CheckpointWriter | None = None
        self._contents: Contents | None = None
        check_file_target(path, STATISTICS)

    @property
    def is_open(self) -> bool:
        """Whether `begin` was called."""
        return self._writer is not None

    @property
    def done(self) -> set[str]:
        """The keys of the inputs that are in it; at the beginning, those that an interrupted run has written."""
        return set() if self._writer is None else set(self._writer.done)

    def begin(self, contents: Contents, fingerprint: str, *, resume: bool) -> None:
        """Take the disk space for these contents."""
        entries = [entry for key, facts in contents.inputs.items() for entry in entries_of(key, facts)]
        entries += [entry for key, shape in contents.outputs.items() for entry in output_entries(key, shape)]
        self._contents = contents
        self._writer = CheckpointWriter(self.path, entries, header(contents), fingerprint=fingerprint, resume=resume)

    def write(self, key: str, statistics: Statistics) -> None:
        """Add an input. Raises `StatisticsError` when it has not the tokens that the first pass counted."""
        assert self._contents is not None
        facts = self._contents.inputs[key]
        if (statistics.tokens, statistics.held_out_tokens) != (facts.tokens, facts.held_out_tokens):
            raise StatisticsError(
                f"{self._contents.sharing(key)[0]}: had {facts.tokens} + {facts.held_out_tokens} tokens in the first "
                f"pass and {statistics.tokens} + {statistics.held_out_tokens} in this one; the iterable must give the "
                "same batches every time, and the model must treat them alike"
            )
        self._add(key, fields_of(statistics))

    def write_outputs(self, outputs: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add the moments of the gradients at outputs by their keys; those that are there already stay."""
        for key in outputs.keys() - self.done:
            self._add(key, outputs[key])

    def _add(self, key: str, fields: Mapping[str, Tensor]) -> None:
        assert self._writer is not None
        assert self._contents is not None
        tensors = packed_fields(key, fields, self._contents.first_with(key))
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)
        self._writer.commit(key, {"tensors": list(tensors)})

    def finish(self) -> None:
        """Put the complete file in its place."""
        assert self._writer is not None
        self._writer.finish()

    def abort(self, *, keep: bool) -> None:
        """Stop; with `keep`, what was written stays for a later run to go on."""
        if self._writer is not None:
            self._writer.abort(keep)
