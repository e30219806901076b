"""Writing a model as one GGUF file, through the gguf package: in blocks of one type, or as a plan says.

Weights are made into blocks one at a time. The file appears in one step, when it is complete. What runs it wants more
than tensors: hyperparameters and a vocabulary go in as `metadata`, or come with a source that is a GGUF file itself. A
warning says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, DependencyError, PlanError, WriteError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.gguf_recast import block_format, put_together
from lowbit.numerics.gguf_encode import WRITABLE
from lowbit.solvers import AUTO
from lowbit.solvers.solve import solve

from .dialects import StoredLayer, TensorSpec
from .dialects.base import join_key, layer_of
from .export_gguf_warnings import lacking
from .gguf_file import GgufFile
from .gguf_names import ARCHITECTURES, TOKEN_TABLES, Naming, model_prefix, name_as_llama_cpp
from .gguf_writer import FLOATS, PLAIN, Entry, as_bytes, write_gguf
from .layer_statistics import LayerStatistics
from .plan import choose_preset
from .plan_data import Plan, TensorPlan
from .presets import BoundPreset
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source
from .target import check_file_target, refuse_inputs
from .weight_shape import weight_shape

KEEP = "keep"
TYPES = (*WRITABLE, *FLOATS, KEEP)
_MAX_NAME = 63  # bytes; ggml keeps names in 64


@dataclass(frozen=True)
class ExportReport:
    """What was written: the file, the type of every tensor by its name there, the file's bytes, and what to know.

    `preset`: the model family whose sensitive layers stayed, "" where nothing was asked, and `preset_why`, why that.
    `kept`: these layers by their names in the source, each with the reason. `warnings`: why no program may load it.
    """

    target: Path
    types: dict[str, str]
    bytes: int
    notes: tuple[str, ...] = ()
    preset: str = ""
    preset_why: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def export_gguf(
    source: Source,
    target: str | Path,
    types: str | Plan = "Q8_0",
    *,
    architecture: str = "",
    metadata: Mapping[str, Any] | None = None,
    requantize: bool = False,
    statistics: LayerStatistics | None = None,
    component: str | None = None,
    preset: str = "auto",
) -> ExportReport:
    """Write a model of `source` as the GGUF file `target`.

    types: one of `TYPES` for all weights of two axes and more ("keep": all as they are), by the solver "auto": of less
        error than by ggml's own encoder, whose bytes "rtn" in a plan gives for Q4_0 to Q8_0 and MXFP4. Rows that such
        blocks do not divide get a type of blocks of 32 columns with about as many bits; those that 32 does not divide
        keep their dtype, and so do plain weights that the preset keeps. Or a plan whose formats are `gguf(type=...)`,
        with its solvers. Other tensors keep their dtype, but vectors become F32, as llama.cpp wants them.
    architecture: written as general.architecture. For one in `gguf_names.ARCHITECTURES`, the tensors of a transformers
        model get llama.cpp's names and order of rows; for others, those of an image model lose the prefix that they
        have in a checkpoint ("model.diffusion_model."). Of a source that is a GGUF file, names and fields are kept.
    metadata: further fields, name -> text, flag, whole number, number or list of these.
    requantize: let weights that are quantized in another format be decoded and quantized again. Blocks of GGUF that
        stay in their type are copied bit for bit, also those that can only be read; mxfp4 becomes MXFP4, and with
        "keep" nvfp4 becomes NVFP4, with the codes that there are.
    statistics: for the solvers. component: which model, where the source has several.
    preset: as in `make_plan`, the model family whose sensitive layers stay in 16 bits; of no matter with a plan.

    Raises:
        DependencyError: the package gguf is missing.
        CheckpointError: quantized weights without `requantize`, a tensor that the file cannot hold, an unsound source.
        WriteError: the target cannot be written. PlanError: a plan of other formats, an unknown preset.
        WeightError: NaN in a weight.
    """
    if util.find_spec("gguf") is None:
        raise DependencyError("writing GGUF files needs the package gguf: pip install gguf")
    check_file_target(target, "model.gguf")
    target = Path(target)
    refuse_inputs([target], [*(file.path for file in source.files.values()), *source.extra_files])
    if target.suffix.lower() != ".gguf":
        raise WriteError(
            f"{target}: would be GGUF under another name, by which it could not be read again; name it "
            f"{target.stem}.gguf"
        )
    if isinstance(types, str) and types not in TYPES:
        raise CheckpointError(f"{types!r} is no GGUF type that is made here; those are {', '.join(TYPES)}")
    chosen = _only_component(source, component)
    held = look_for_layers(source, source.component(chosen))
    file = next(iter(held.component.files.values()))
    family, why, bound = "", "", None
    if isinstance(types, str) and types in WRITABLE:
        keys = list(held.component.tensors)
        found, why = choose_preset(preset, keys)
        family, bound = found.name, found.bind(keys) if preset != "none" else None
    work = _Export(held, types, architecture, requantize, statistics, bound)
    entries = work.entries()
    fields = {**_file_type(types), **(metadata or {})}
    write_gguf(target, entries, architecture, fields, file.path if isinstance(file, GgufFile) else None)
    names = {entry.name: entry.kind for entry in entries}
    warnings = tuple(lacking(file, architecture, fields, str(target)))
    return ExportReport(target, names, target.stat().st_size, tuple(work.notes), family, why, work.kept, warnings)


class _Export:
    """Decides what becomes of every tensor of one model."""

    def __init__(
        self,
        held: QuantizedComponent,
        types: str | Plan,
        architecture: str,
        requantize: bool,
        statistics: LayerStatistics | None,
        preset: BoundPreset | None,
    ) -> None:
        self._held, self._types, self._preset = held, types, preset
        self._requantize, self._statistics = requantize, statistics
        self._planned: dict[str, TensorPlan] = {}
        if isinstance(types, Plan):
            types.check_against(held.source)
            self._planned = {tensor.key: tensor for tensor in types.component(held.component.name).tensors}
        self.notes: list[str] = []
        self.kept: dict[str, str] = {}
        self._prefix = ""  # that names have in the source and not in the file
        self._naming = self._names(architecture)

    def _names(self, architecture: str) -> Naming:
        """The names in the file. An image model among others (a checkpoint with its autoencoder) keeps its prefix."""
        held = self._held
        if architecture in ARCHITECTURES:
            return name_as_llama_cpp(held, architecture)
        keys = [join_key(layer, "weight") for layer in held.layers] + held.found.plain
        keys = [key for key in keys if key not in self._planned or self._planned[key].action != "drop"]
        if any(isinstance(file, GgufFile) for file in held.component.files.values()):
            return Naming({}, {})
        self._prefix = model_prefix(keys)
        if not self._prefix or not all(key.startswith(self._prefix) for key in keys):
            return Naming({}, {})
        self.notes.append(f"names are written without {self._prefix!r}, as ComfyUI-GGUF looks for them")
        return Naming({key: key.removeprefix(self._prefix) for key in keys}, {})

    def entries(self) -> list[Entry]:
        """Every tensor of the file, in the order of the source's data."""
        by_key = {stored.keys.get("qdata", ""): stored for stored in self._held.layers.values()}
        plain = set(self._held.found.plain)
        found: list[Entry] = []
        for key, spec in self._held.specs.items():
            if self._planned and key in self._planned and self._planned[key].action == "drop":
                continue
            if key in by_key:
                found += self._coded(by_key[key], self._planned.get(key))
            elif key in plain:
                found.append(self._plain(key, spec))
        names = [entry.name for entry in found]
        for name in names:
            if len(name.encode()) > _MAX_NAME:
                raise CheckpointError(
                    f"{self._held.where}: the name {name!r} is longer than the {_MAX_NAME} bytes that ggml has for "
                    f"one; {self._shorter(names)}"
                )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{self._held.where}: two tensors would be named {twice!r}; name none as the other")
        return found

    def _shorter(self, names: list[str]) -> str:
        """What to do about a name that is too long."""
        others = [name for name in names if not name.startswith(self._prefix)]
        if not self._prefix or not others:
            return "rename it in the source"
        return (
            f"{self._prefix!r} is left out of the names of a model that is alone in its file, and here are other "
            f"tensors too ({others[0]!r}): save the model without them, or give a plan (lowbit plan -o, export --plan) "
            'with "action": "drop" for them'
        )

    def _plain(self, key: str, spec: TensorSpec) -> Entry:
        planned = self._planned.get(key)
        read = partial(self._held.read, key)
        if planned is not None and planned.action == "quantize":
            return self._solved(key, spec.shape, _blocks_of(planned), planned.solver, read)
        if spec.dtype not in PLAIN:
            raise CheckpointError(
                f"{self._held.where}: tensor {key!r} is {spec}, which GGUF has no type for; convert or drop it first"
            )
        if len(spec.shape) < 2:
            kind = "F32" if spec.dtype.is_floating_point else PLAIN[spec.dtype]
            return Entry(self._naming.of(key), kind, spec.shape, partial(self._bytes_of, key, kind))
        kind = PLAIN[spec.dtype]
        weight = spec.dtype.is_floating_point and layer_of(key) is not None and spec.shape[-1] > 0
        if isinstance(self._types, str) and weight:
            kind = kind if self._is_kept(key) else self._chosen(key, spec.shape, kind)
        if kind in WRITABLE:
            return self._solved(key, spec.shape, _format(kind), AUTO, read)
        return Entry(self._naming.of(key), kind, spec.shape, partial(self._bytes_of, key, kind))

    def _is_kept(self, key: str) -> bool:
        """Whether the preset keeps a plain weight as it is; llama.cpp's tools quantize both tables of tokens, too."""
        if self._naming.of(key) in TOKEN_TABLES:
            return False
        layer = layer_of(key) or key
        opinion = None if self._preset is None else self._preset.decide(layer)
        if opinion is None or opinion.action != "keep":
            return False
        self.kept[layer] = opinion.why
        return True

    def _chosen(self, key: str, shape: tuple[int, ...], kind: str) -> str:
        """The type asked for; where its blocks do not divide the rows, one of smaller blocks, or `kind`, its own."""
        wanted = kind if self._types == KEEP else str(self._types)
        if wanted not in WRITABLE:
            return wanted
        n, k, smaller = math.prod(shape[:-1]), shape[-1], _format(wanted).smaller
        why = _format(wanted).check_shape(n, k)
        if why is None:
            return wanted
        fits = smaller if smaller and _format(smaller).check_shape(n, k) is None else ""
        instead = f"made {fits}" if fits else f"kept as {kind}"
        self.notes.append(f"{key}: {list(shape)} {why.partition(';')[0]}; {instead}")
        return fits or kind

    def _coded(self, stored: StoredLayer, planned: TensorPlan | None) -> list[Entry]:
        """The tensors of a layer that is quantized already."""
        fmt = stored.format
        wanted = _blocks_of(planned) if planned is not None and planned.action == "quantize" else None
        key = join_key(stored.layer, "weight")
        if isinstance(self._types, str) and self._types in WRITABLE:
            wanted = _format(self._chosen(key, stored.shape, self._types))
        decoded = isinstance(self._types, str) and self._types in FLOATS
        if isinstance(fmt, GgufBlock) and not decoded and (wanted is None or wanted.type == fmt.type):
            return self._copied(stored, fmt, partial(self._held.load, stored))
        same = block_format(fmt, stored.shape)
        if isinstance(same, GgufBlock) and not decoded and (wanted is None or wanted.type == same.type):
            return self._copied(stored, same, partial(self._put_together, stored))
        if not self._requantize and not decoded:
            raise CheckpointError(
                f"{stored.place}: is quantized already, as {fmt}; quantizing again loses more than quantizing the "
                "original, which is better to start from. To do it anyway, ask for it with requantize (--requantize)"
            )
        if (weight := weight_shape(stored)).axes:
            raise CheckpointError(
                f"{stored.place}: is the {weight.kind}, which is not decoded here; decode the model first (lowbit "
                "dequantize)"
            )
        if fmt.folds_bias:
            raise CheckpointError(
                f"{stored.place}: the bias of {fmt} holds a share of the weight; decode the model first (lowbit "
                "dequantize)"
            )
        if decoded:
            kind = str(self._types)
            make = partial(self._decoded_bytes, stored, FLOATS[kind])
            return [Entry(self._naming.of(key), kind, stored.shape, make)]
        if wanted is None:
            raise PlanError(f"{stored.place}: a GGUF file cannot keep {fmt}; choose gguf(type=...) for this layer")
        solver = planned.solver if planned is not None else AUTO
        read = partial(self._decoded, stored, torch.float32)
        return [self._solved(key, stored.shape, wanted, solver, read)]

    def _copied(self, stored: StoredLayer, fmt: GgufBlock, loaded: Callable[[], Parts]) -> list[Entry]:
        """Blocks with the codes that there are, and the scales beside them."""
        key = join_key(stored.layer, "weight")
        entries = [Entry(self._naming.of(key), fmt.type, stored.shape, partial(self._ordered_blocks, key, loaded))]
        for part, suffix in (("global_scale", "scale"), ("input_scale", "input_scale")):
            if part in fmt.part_names:
                name = join_key(self._naming.of(key).removesuffix(".weight"), suffix)
                entries.append(Entry(name, "F32", (1,), partial(_part_bytes, loaded, part)))
        return entries

    def _solved(
        self, key: str, shape: tuple[int, ...], fmt: GgufBlock, solver: str, read: Callable[[], Tensor]
    ) -> Entry:
        layer = layer_of(key) or key

        def make() -> Tensor:
            w = read().reshape(math.prod(shape[:-1]), shape[-1])  # -1 has no meaning where there are no columns
            where = f"{self._held.where}: layer {layer!r}"
            known = None if self._statistics is None else self._statistics.get(self._held.full_name(layer))
            qdata = solve(w, fmt, solver or "rtn", known, where=where).parts["qdata"]
            return self._ordered(key, qdata.reshape(*shape[:-1], qdata.shape[-1]))  # rows as statistics know them first

        return Entry(self._naming.of(key), fmt.type, shape, make)

    def _put_together(self, stored: StoredLayer) -> Parts:
        return put_together(stored.format, self._held.load(stored), stored.shape, stored.place)

    def _ordered_blocks(self, key: str, loaded: Callable[[], Parts]) -> Tensor:
        return self._ordered(key, loaded()["qdata"])

    def _read(self, key: str) -> Tensor:
        return self._ordered(key, self._held.read(key))

    def _ordered(self, key: str, tensor: Tensor) -> Tensor:
        order = self._naming.order(key, tensor.shape[0]) if tensor.dim() else None
        return tensor if order is None else tensor[order]

    def _decoded(self, stored: StoredLayer, dtype: torch.dtype) -> Tensor:
        w, _ = self._held.dequantized(stored, dtype)
        return w

    def _decoded_bytes(self, stored: StoredLayer, dtype: torch.dtype) -> Tensor:
        return as_bytes(self._ordered(join_key(stored.layer, "weight"), self._decoded(stored, dtype)))

    def _bytes_of(self, key: str, kind: str) -> Tensor:
        tensor = self._read(key)
        return as_bytes(tensor.to(FLOATS[kind]) if kind in FLOATS else tensor)


def _part_bytes(load: Callable[[], Parts], name: str) -> Tensor:
    return as_bytes(load()[name].reshape(1))


def _format(kind: str) -> GgufBlock:
    fmt = parse_spec(f"gguf(type={kind})")
    assert isinstance(fmt, GgufBlock)
    return fmt


def _blocks_of(planned: TensorPlan) -> GgufBlock:
    """The format of a planned tensor. Raises `PlanError` for one that GGUF has no blocks for."""
    fmt: Format = planned.fmt
    if not isinstance(fmt, GgufBlock) or not fmt.encodable or len(fmt.part_names) > 1:
        raise PlanError(
            f"layer {planned.layer!r}: the plan says {fmt}, and a GGUF file is given gguf(type=...) of "
            f"{', '.join(WRITABLE)}"
        )
    return fmt


def _file_type(types: str | Plan) -> dict[str, int]:
    """llama.cpp's number for files that are mostly of one type."""
    import gguf

    names = {f"{prefix}_{types}{suffix}" for prefix in ("MOSTLY", "ALL") for suffix in ("", "_MOE", "_S")}
    number = next((int(kind) for kind in gguf.LlamaFileType if kind.name in names), None)
    return {} if number is None else {"general.file_type": number}


def _only_component(source: Source, name: str | None) -> str:
    if name is not None:
        return name
    if len(source.components) > 1:
        names = ", ".join(repr(component.name) for component in source.components)
        raise CheckpointError(f"{source.place}: holds several models, a GGUF file holds one; name one of {names}")
    return source.components[0].name
