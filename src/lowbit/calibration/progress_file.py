"""The state of an unfinished calibration beside its target, `<target>.progress`, so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor

from .gradients import Gradients
from .observe import Observer

_log = logging.getLogger("lowbit")

KEY = "lowbit.calibration"
_BACKWARD = "backward."  # begins the names of tensors of gradients
_LOOKED_AT = 16  # elements of a weight that tell it from another model's
_SHARE = 20  # a snapshot is not taken before this many times the seconds that the last one took


def fingerprint(linears: Mapping[str, nn.Linear], facts: Mapping[str, Any]) -> str:
    """A hex digest of the linears (names, shapes, dtypes, some weights) and of the options."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        found.update(repr((name, shape, str(linear.weight.dtype))).encode())
        weight = linear.weight.detach()
        stored = list(weight.parts.values()) if isinstance(weight, QuantizedTensor) else [weight]
        for tensor in stored:
            some = tensor.flatten()[:: max(tensor.numel() // _LOOKED_AT, 1)]
            if not some.is_meta:
                found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def memory_of(target: Path, run: str) -> int | None:
    """The memory that the interrupted run to a target took, which decides on passes; None of another `run`."""
    path = _path_of(target)
    try:
        with SafetensorsFile(path) as file:
            data = json.loads(file.metadata[KEY])
    except (CheckpointError, KeyError, ValueError):
        return None
    found = data.get("memory")
    return found if isinstance(found, int) and data.get("run") == run else None


def _path_of(target: Path) -> Path:
    return target.with_name(target.name + ".progress")


class ProgressFile:
    """Snapshots of an observer, each with a record (JSON data) of where the run is.

    `gradients`: those that are taken in the observer's first pass, or None. `run`: the fingerprint of all that the
    caller gave, `key`: with what came of it.
    """

    def __init__(
        self, target: Path, observer: Observer, gradients: Gradients | None, run: str, key: str, every: float
    ) -> None:
        self.run = run
        self.path = _path_of(target)
        self.observer, self.gradients, self.key, self._every = observer, gradients, key, every
        self._saved_at, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time for a snapshot; with `every` 0 it always is."""
        return not self._every or time.monotonic() - self._saved_at >= max(self._every, _SHARE * self._took)

    def save(self, record: Mapping[str, Any]) -> None:
        """Write a snapshot over the last one. Raises `WriteError`."""
        began = time.monotonic()
        tensors = {f"{name}/{field}": tensor for name, field, tensor in self._tensors()}
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        data = {
            "fingerprint": self.key,
            "record": dict(record),
            "observer": self.observer.state(),
            "memory": self.observer.memory,
            "run": self.run,
        }
        writer = CheckpointWriter(self.path, entries, {KEY: json.dumps(data)}, fingerprint=self.key, resume=False)
        try:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.finish()
        except BaseException:
            writer.abort(keep=False)
            raise
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began

    def _tensors(self) -> list[tuple[str, str, Tensor]]:
        found = [
            (name, field, tensor)
            for name, group in self.observer.groups.items()
            if group.accumulator is not None
            for field, tensor in group.accumulator.state().items()
        ]
        backward = () if self.gradients is None else self.gradients.state()
        return found + [(name, _BACKWARD + field, tensor) for name, field, tensor in backward]

    def restore(self, devices: Mapping[str, torch.device]) -> dict[str, Any] | None:
        """Bring the observer back to the last snapshot and return its record; None where there is none that fits."""
        if not self.path.exists():
            return None
        try:
            with SafetensorsFile(self.path) as file:
                data = json.loads(file.metadata[KEY])
                if data["fingerprint"] != self.key:
                    _log.warning("%s: is of another model or of other options; starting afresh", self.path)
                    return None
                states: dict[str, dict[str, Tensor]] = {}
                backward: dict[str, dict[str, Tensor]] = {}
                for name in file.tensors:
                    group, _, field = name.rpartition("/")
                    kind = backward if field.startswith(_BACKWARD) else states
                    kind.setdefault(group, {})[field.removeprefix(_BACKWARD)] = file.read(name)
        except (CheckpointError, KeyError, ValueError) as error:
            _log.warning("%s: cannot be used (%s); starting afresh", self.path, error)
            return None
        self.observer.restore(data["observer"])
        for group, state in states.items():
            self.observer.allocate(group, devices[group]).restore(state)
        if self.gradients is not None:
            for name, state in backward.items():
                self.gradients.restore(name, state, devices.get(name))
        record: dict[str, Any] = data["record"]
        _log.warning("%s: going on with an interrupted run", self.path)
        return record

    def remove(self) -> None:
        """Remove the last snapshot, if there is one."""
        self.path.unlink(missing_ok=True)
