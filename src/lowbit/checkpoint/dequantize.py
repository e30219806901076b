"""A quantized checkpoint turned back into a plain one: every layer decoded, every other tensor copied.

Tensors that were cast to 8-bit floats without a scale are values as they are; they are written in 16 bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError

from .banks import decoded_expert, experts_of
from .cast_weights import cast_tensors
from .dialects import StoredLayer, TensorSpec
from .dialects.base import join_key
from .eligibility import dtype_name
from .folder_configs import FolderConfigs
from .output import Staging
from .pipeline import Progress
from .quantized_source import QuantizedComponent, look_for_layers
from .rewrite import Copy, Made, Piece, Settings, batch_copies, rewrite
from .source import Source
from .weight_shape import as_plain, plain_key, plain_shape, value_dtype

_WORKSPACE = 16 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class DequantizeReport:
    """What was decoded: the layers' names with the formats they had; how many other tensors were copied.

    `widened`: how many tensors of 8-bit floats without a scale became wider floats of the same value.
    """

    target: str
    layers: dict[str, str]
    copied: int
    resumed: int
    bytes_after: int
    seconds: float
    widened: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return dict(vars(self))


def dequantize(
    source: Source,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> DequantizeReport:
    """Write the effective weights of a quantized checkpoint, as a file that any program loads.

    `dtype`: of the decoded weights; by default what each was before it was quantized, bfloat16 for those that were cast
    to 8-bit floats. Biases that a format had put a
    constant into get it back. Scales, markers and the description in the header are left out; a folder's config.json
    names the dtype that the weights now have. Other options as in `convert`.

    Raises:
        CheckpointError: nothing in the source is quantized or cast, a layer is not sound, 8-bit floats have a scale
            that lowbit does not know, or writing failed.
    """
    began = time.perf_counter()
    _check_dtype(dtype)
    staging = Staging(source, target)
    metadata = staging.metadata()
    pieces: list[Piece | Copy] = []
    layers: dict[str, str] = {}
    widened = 0
    configs = FolderConfigs()
    for component in source.components:
        held = look_for_layers(source, component)
        casts = cast_tensors(held)
        widened += len(casts)
        pieces += _pieces(held, staging, dtype, casts)
        layers |= {held.full_name(name): stored.format.spec for name, stored in held.layers.items()}
        for entries in metadata.values():
            held.strip_description(entries)
        configs.strip(held)
        were = {stored.dtype for stored in held.layers.values()} | {spec.dtype for spec in casts.values()}
        if were and not staging.single:
            configs.decode(held, were, dtype)
    if not layers and not widened:
        raise CheckpointError(
            f"{source.place}: holds no quantized layer and no 8-bit floats; there is nothing to decode"
        )
    staging.replaced = configs.texts()
    facts = ["dequantize", source.fingerprint(), str(dtype), torch.__version__]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    settings = Settings(jobs, resume, verify=True, progress=progress)
    done = rewrite(source, staging, pieces, metadata, fingerprint=fingerprint, settings=settings)
    copied = sum(len(piece.specs) for piece in pieces if isinstance(piece, Copy))
    size = sum(spec.nbytes for piece in pieces for spec in piece.specs.values())
    return DequantizeReport(str(target), layers, copied, done.resumed, size, time.perf_counter() - began, widened)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(map(dtype_name, DTYPES))
        raise CheckpointError(f"cannot decode to {dtype_name(dtype)}; the dtypes for weights are {names}")


def _pieces(
    held: QuantizedComponent, staging: Staging, dtype: torch.dtype | None, casts: Mapping[str, TensorSpec]
) -> list[Piece | Copy]:
    """One piece a quantized layer or cast tensor, and copies of all other tensors that mean something."""
    pieces: list[Piece | Copy] = []
    folded: set[str] = set()
    for layer, stored in held.layers.items():
        bias = held.bias_key(layer) if stored.format.folds_bias else None
        specs = {plain_key(stored): TensorSpec(dtype or stored.dtype, plain_shape(stored))}
        if stored.format.folds_bias:
            key = join_key(layer, "bias")
            specs[key] = held.specs[key] if bias is not None else TensorSpec(dtype or stored.dtype, stored.shape[:1])
            folded.add(key)
        size = sum(held.specs[key].nbytes for key in stored.keys.values())
        memory = (2 * size + 2 * sum(spec.nbytes for spec in specs.values())) // (experts_of(stored) or 1) + _WORKSPACE
        file = staging.file_of(held.component, stored.keys["qdata"])
        pieces.append(Piece(held.full_name(layer), file, specs, size, memory, _Decode(held, stored, specs)))
    for key, spec in casts.items():
        specs = {key: TensorSpec(dtype or value_dtype(spec.dtype), spec.shape)}
        memory = spec.nbytes + 2 * specs[key].nbytes + _WORKSPACE
        file = staging.file_of(held.component, key)
        pieces.append(Piece(f"widen {held.full_name(key)}", file, specs, spec.nbytes, memory, _Widen(held, specs)))
    plain = [key for key in held.found.plain if key not in folded and key not in casts]
    pieces += batch_copies(held.component, plain, lambda key: staging.file_of(held.component, key))
    return pieces


@dataclass(frozen=True)
class _Decode:
    """Makes the plain tensors `specs` of one layer."""

    held: QuantizedComponent
    stored: StoredLayer
    specs: dict[str, TensorSpec]

    def __call__(self) -> Made:
        weight, bias = plain_key(self.stored), join_key(self.stored.layer, "bias")
        if experts_of(self.stored):
            return Made({}, slices=self._experts(weight))
        w, share = self.held.dequantized(self.stored, self.specs[weight].dtype)
        tensors = {weight: as_plain(w, self.stored)}
        if bias in self.specs:
            true = self.held.read(bias).float() if bias in self.held.specs else torch.zeros(self.stored.shape[0])
            tensors[bias] = (true if share is None else true + share).to(self.specs[bias].dtype)
        return Made(tensors)

    def _experts(self, key: str) -> Iterator[Made]:
        """A bank, one expert at a time."""
        for index in range(experts_of(self.stored)):
            w = decoded_expert(self.held, self.stored, index, self.specs[key].dtype)
            yield Made({key: as_plain(w, self.stored)})


@dataclass(frozen=True)
class _Widen:
    """Makes one tensor of 8-bit floats in the dtype of its spec, which holds all of its values."""

    held: QuantizedComponent
    specs: dict[str, TensorSpec]

    def __call__(self) -> Made:
        return Made({key: self.held.read(key).to(spec.dtype) for key, spec in self.specs.items()})
