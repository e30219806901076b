"""A checkpoint with a LoRA baked in, streamed from file to file: no model is loaded.

Layers that the adapter changes are read, changed and written in the same format and dialect; all other tensors are
copied byte for byte, in the dtypes they have, and the header keeps what others wrote into it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects import Dialect, StoredLayer, TensorSpec
from lowbit.checkpoint.dialects.base import bias_orders, join_key, layer_of
from lowbit.checkpoint.fold_data import ROWS
from lowbit.checkpoint.folder_configs import FolderConfigs, refuse_target
from lowbit.checkpoint.folding import folds_of
from lowbit.checkpoint.output import Staging
from lowbit.checkpoint.pipeline import Progress
from lowbit.checkpoint.quantized_source import QuantizedComponent, look_for_layers
from lowbit.checkpoint.respell import Respelled
from lowbit.checkpoint.rewrite import Copy, Made, Piece, Settings, batch_copies, rewrite
from lowbit.checkpoint.source import Source, open_source
from lowbit.checkpoint.target import refuse_inputs
from lowbit.checkpoint.weight_shape import KERNEL
from lowbit.errors import WeightError
from lowbit.formats.parts import FLOATS
from lowbit.lora.adapter import Adapter
from lowbit.lora.adapter_delta import Delta
from lowbit.lora.bake_layer import LayerBake, bake_plain, bake_weight, baked_format
from lowbit.lora.layers import AnyAdapter, as_adapter, check_strength

_HEADER = "baked_lora"  # of the header metadata: what was baked in, one JSON object an adapter, oldest first
_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class BakeReport:
    """What was baked: each changed layer's account; the adapter's names without a layer; how much was copied."""

    target: str
    layers: dict[str, LayerBake]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    copied: int
    resumed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def bake_checkpoint(
    source: Source | str | Path,
    target: str | Path,
    adapter: AnyAdapter,
    *,
    strength: float = 1.0,
    rounding: str | None = None,
    seed: int = 0,
    strict: bool = True,
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> BakeReport:
    """Write `source` with an adapter baked in. Quantized and plain layers; a file, shards or a model folder.

    adapter, strength, rounding, seed, strict: as in `bake_lora`. Other options as in `convert`.

    Raises:
        CheckpointError: the adapter fits no layer (or, `strict`, not all of it does), reading or writing failed.
        FormatError: a layer's format cannot be written; nothing has been written then.
        PlanError: the dialect of the source is only read.
    """
    began = time.perf_counter()
    check_strength(strength)
    with ExitStack() as stack:
        opened = source if isinstance(source, Source) else stack.enter_context(open_source(source))
        read = as_adapter(adapter)
        refuse_inputs([Path(target)], [Path(read.where)])
        work = _Work(Staging(opened, target), _Setting(float(strength), rounding, seed, read.where))
        for component in opened.components:
            work.add(look_for_layers(opened, component), read)
        read.check(work.used, work.known, strict=strict)
        work.staging.replaced = work.configs.texts()
        about = {"file": Path(read.where).name, "strength": float(strength), "rounding": rounding or "auto"}
        metadata = {file: _with_note(entries, about) for file, entries in work.metadata.items()}
        facts = ["bake", opened.fingerprint(), adapter_digest(read), about, seed, strict, torch.__version__]
        fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        settings = Settings(jobs, resume, verify=True, progress=progress)
        done = rewrite(opened, work.staging, work.pieces, metadata, fingerprint=fingerprint, settings=settings)
    accounts = {name: LayerBake(**done.records[name]["bake"]) for name in work.changed}
    unmatched = tuple(own for own in read.layers if own not in work.used)
    copied = sum(len(piece.specs) for piece in work.pieces if isinstance(piece, Copy))
    seconds = time.perf_counter() - began
    return BakeReport(str(target), accounts, unmatched, (*read.notes, *work.notes), copied, done.resumed, seconds)


def _misfits(held: QuantizedComponent, layers: Collection[str]) -> list[str]:
    """A note where an adapter changes layers whose inputs or outputs a conversion has scaled."""
    folds = folds_of(held.source, held.component)
    scaled = {name for f in folds for name in (*f.linears, *((f.before,) if f.kind == ROWS else ()))} & set(layers)
    if not scaled:
        return []
    note = (
        f"{held.where}: scales are folded into {len(scaled)} of the layers that the adapter changes, such as "
        f"{min(scaled)}; one that was made for the model before does not fit them: bake it into that, then convert"
    )
    return [note]


@dataclass(frozen=True)
class _Setting:
    strength: float
    rounding: str | None
    seed: int
    adapter: str

    @contextmanager
    def naming(self) -> Iterator[None]:
        """What is wrong with a change is the adapter's: name its file before the layer."""
        try:
            yield
        except WeightError as error:
            raise WeightError(f"{self.adapter}: {error}" if self.adapter else str(error)) from error


class _Work:
    """What there is to do for all models of a source."""

    def __init__(self, staging: Staging, setting: _Setting) -> None:
        self.staging, self._setting = staging, setting
        self.metadata = staging.metadata()
        self.pieces: list[Piece | Copy] = []
        self.changed: list[str] = []
        self.known: list[str] = []
        self.used: set[str] = set()
        self.notes: list[str] = []
        self.configs = FolderConfigs()

    def add(self, held: QuantizedComponent, adapter: Adapter) -> None:
        """Add one model."""
        if held.dialect is not None and held.dialect.needs_folder and held.layers:
            refuse_target(held, held.dialect, single=self.staging.single)
        shapes = layer_shapes(held)
        matched = adapter.find(shapes)
        self.known += [held.full_name(name) for name in shapes]
        self.used |= matched.names.keys()
        self.notes += held.found.notes + _misfits(held, matched.layers)
        owned: set[str] = set()
        stored: dict[str, list[StoredLayer]] = {}
        for layer in held.layers.values():
            new = self._quantized(held, layer, matched.layers.get(layer.layer), owned)
            stored.setdefault(self.staging.file_of(held.component, layer.keys["qdata"]), []).append(new)
        for name, delta in matched.layers.items():
            if name not in held.layers:
                self._plain(held, name, delta, owned)
        plain = [key for key in held.found.plain if key not in owned]
        self.pieces += batch_copies(held.component, plain, partial(self.staging.file_of, held.component))
        if held.dialect is not None and held.layers:
            self._describe(held, held.dialect, stored)

    def _quantized(
        self, held: QuantizedComponent, layer: StoredLayer, delta: Delta | None, owned: set[str]
    ) -> StoredLayer:
        """Add a quantized layer, changed or not; returns how it is written."""
        dialect = held.dialect
        assert dialect is not None
        file = self.staging.file_of(held.component, layer.keys["qdata"])
        name = held.full_name(layer.layer)
        size = sum(held.specs[key].nbytes for key in layer.keys.values())
        if delta is None:
            mine = {key: held.specs[key] for key in layer.keys.values()}
            if dialect.writes and dialect.stored_specs(replace(layer, keys={}, notes=[])) != mine:
                plan = Respelled.plan(held, layer, dialect)  # an older spelling, which the new header does not describe
                self.pieces.append(Piece(name, file, plan.specs, size, 6 * size, plan))
                return plan.new
            self.pieces.append(Copy(f"copy {name}", file, held.component, mine))
            return layer
        refuse_target(held, dialect, single=self.staging.single)
        fmt = baked_format(layer.format, delta, layer.shape, self._setting.rounding, layer.place)
        new = replace(layer, format=fmt, keys={}, notes=[])
        specs = dict(dialect.stored_specs(new))
        bias = join_key(layer.layer, "bias")
        if fmt.folds_bias and (bias in held.specs or fmt == layer.format):
            specs[bias] = held.specs.get(bias, TensorSpec(layer.dtype, layer.shape[:1]))
            owned.add(bias)
        n, k = layer.shape
        memory = 4 * size + 16 * n * k + _WORKSPACE
        self.pieces.append(Piece(name, file, specs, size, memory, _Bake(held, layer, new, specs, delta, self._setting)))
        self.changed.append(name)
        return new

    def _plain(self, held: QuantizedComponent, name: str, delta: Delta, owned: set[str]) -> None:
        """Add a layer that is not quantized."""
        key = join_key(name, "weight")
        spec, file = held.specs[key], self.staging.file_of(held.component, key)
        owned.add(key)
        make = _BakePlain(held, key, delta, self._setting)
        full = held.full_name(name)
        self.pieces.append(Piece(full, file, {key: spec}, spec.nbytes, 8 * spec.nbytes, make))
        self.changed.append(full)

    def _describe(self, held: QuantizedComponent, dialect: Dialect, stored: Mapping[str, list[StoredLayer]]) -> None:
        """Say in the headers and JSON files what the layers are now."""
        if not dialect.writes:
            return
        plain = {key: held.specs[key] for key in held.found.plain}
        changed = [layer for layers in stored.values() for layer in layers]
        self.staging.reorder(held.component, bias_orders(dialect, changed))
        for file in {self.staging.file_of(held.component, key) for key in held.specs}:
            held.strip_description(self.metadata[file])
            if stored.get(file):
                self.metadata[file].update(dialect.header_metadata(stored[file], plain))
        self.configs.strip(held)
        self.configs.describe(held, dialect, changed, plain)


@dataclass(frozen=True)
class _Bake:
    """Makes the tensors of one changed layer."""

    held: QuantizedComponent
    old: StoredLayer
    new: StoredLayer
    specs: Mapping[str, TensorSpec]
    delta: Delta
    setting: _Setting

    def __call__(self) -> Made:
        how, dialect = self.setting, self.held.dialect
        assert dialect is not None
        parts = self.held.load(self.old)
        with how.naming():
            made = bake_weight(
                self.old.format, parts, self.old.shape, self.delta, how.strength, how.rounding, seed=how.seed,
                where=self.old.layer or "weight",
            )  # fmt: skip
        tensors = dict(dialect.store_parts(self.new, made.parts))
        bias = join_key(self.old.layer, "bias")
        if bias in self.specs:
            old = self.held.read(bias).float() if bias in self.held.specs else torch.zeros(self.old.shape[0])
            gain = 0.0 if made.bias_change is None else made.bias_change
            tensors[bias] = (old + gain).to(self.specs[bias].dtype)
        return Made(tensors, {"bake": asdict(made.account)})


@dataclass(frozen=True)
class _BakePlain:
    """Makes one changed weight of 16 or 32 bits."""

    held: QuantizedComponent
    key: str
    delta: Delta
    setting: _Setting

    def __call__(self) -> Made:
        weight = self.held.read(self.key)
        with self.setting.naming():
            new, account = bake_plain(weight, self.delta, self.setting.strength, self.key)
        return Made({self.key: new}, {"bake": asdict(account)})


def layer_shapes(held: QuantizedComponent) -> dict[str, tuple[int, ...]]:
    """The layers of a model that an adapter may change, with the logical shapes of their weights."""
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(stored.options.get(KERNEL, stored.shape)) for name, stored in held.layers.items()
    }
    for key in held.found.plain:
        name, spec = layer_of(key), held.specs[key]
        if name is not None and len(spec.shape) >= 2 and spec.dtype in FLOATS:
            shapes[name] = spec.shape
    return shapes


def _with_note(metadata: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, str]:
    """The header metadata with what was baked in now, after what was before."""
    try:
        before = json.loads(metadata.get(_HEADER, "[]"))
    except ValueError:
        before = [metadata[_HEADER]]  # another program's entry of this name: kept as it is
    return {**metadata, _HEADER: json.dumps([*(before if isinstance(before, list) else [before]), about])}


def adapter_digest(adapter: Adapter) -> str:
    """What tells one adapter's values from another's: names, scales and the tensors themselves."""
    digest = hashlib.sha256()
    for name, delta in sorted(adapter.layers.items()):
        digest.update(f"{name} ".encode())
        for piece in _content(delta):
            digest.update(piece)
    return digest.hexdigest()


def _content(value: object) -> Iterator[bytes]:
    """All that a change is made of: tensors, scales, and other changes with their strengths or first rows."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield _bytes(value)
    elif isinstance(value, Delta):
        yield f"{type(value).__name__}(".encode()
        for own in fields(value):  # type: ignore[arg-type]
            yield from _content(getattr(value, own.name))
        yield b")"
    elif isinstance(value, list | tuple):
        yield b"["
        for one in value:
            yield from _content(one)
        yield b"]"
    else:
        yield f"{value} ".encode()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
