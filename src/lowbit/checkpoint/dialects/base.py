"""What a dialect is: one on-disk convention for quantized layers, as pure functions on names, metadata and tensors.

A dialect never opens a file. What lies where comes in as a `Container` (headers, and the JSON files beside them),
tensors come through a callable `read(key)`, and what should be written goes out as specs first (they fix the offsets)
and tensors later.
Canonical parts (`formats`) are the only arrangement that the rest of lowbit knows; nibble order, swizzles, padding, key
names and JSON fields end here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, PartsError
from lowbit.formats import Format, Parts

Read = Callable[[str], Tensor]
Shape = tuple[int, int]

CONFIG_FILES = ("config.json", "hf_quant_config.json", "quantize_config.json")

# Names and types by which a quantized weight shows itself where no known dialect describes it.
_FOREIGN_SUFFIXES = (".qweight", ".weight_packed", ".qzeros", ".weight_scale_inv", ".weight_global_scale")
_CODE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale", "weight_scale_2", "scale_weight")


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor at hand."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Container:
    """What a model's files say before any data is read.

    `tensors`: every tensor. `metadata`: the header metadata. `configs`: the parsed JSON files beside the weights that
    dialects know (`CONFIG_FILES`), by file name. `where`: the file or folder, for messages.
    """

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer as a file holds it, or as it is to be written.

    `shape` is logical. Where a file pads (nvfp4, mxfp8) and does not tell the shape, it is the padded one; a caller who
    knows better passes `dataclasses.replace(stored, shape=(n, k))` on, and `load_parts` cuts to that.
    """

    layer: str
    """The key prefix without ".weight"; empty for a bare layer."""
    format: Format
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    """The logical dtype: what the weight was before it was quantized."""
    keys: dict[str, str] = field(default_factory=dict)
    """Role of a stored tensor -> its key. Part names, and "marker"; everything the layer owns but the bias."""
    layout: str = ""
    """"" or the name of the kernel arrangement that the file uses."""
    options: dict[str, Any] = field(default_factory=dict)
    """What a round trip must keep although it is not the format's: flags of a runtime, JSON fields unknown to us."""
    notes: list[str] = field(default_factory=list)
    """What was inferred or repaired, in words."""
    where: str = ""
    """The file, for messages."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """The dtypes of the parts that a format leaves open, as the file has them."""
    padded: bool = False
    """Whether `shape` is that of padded codes, because the file does not tell the logical one."""

    @property
    def place(self) -> str:
        """File and layer, as messages name them."""
        return name_place(self.where, self.layer)


@dataclass(frozen=True)
class Problem:
    """Something wrong with one layer (or with the container, `layer` empty): the error that strict reading raises."""

    layer: str
    error: LowbitError

    @property
    def message(self) -> str:
        """The error in words."""
        return str(self.error)


@dataclass
class FoundLayers:
    """What a file holds: quantized layers, all other keys, and what is wrong with it."""

    layers: dict[str, StoredLayer] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    """Keys that belong to no layer in `layers`, biases included, in the file's order."""
    container: list[str] = field(default_factory=list)
    """Keys that only describe the file or mean nothing (a `scaled_fp8` marker, a scale of 1 beside a plain weight)."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    """Entries of the header metadata that describe single layers, beside the dialect's `owned_metadata`."""
    orders: dict[str, Tensor] = field(default_factory=dict)
    """Plain vectors that lie in a kernel's order: key -> where each value lies, int64 [N]. Readers get them in their
    natural order."""

    def rest_is_plain(self, keys: Iterable[str]) -> None:
        """Take those of all keys for plain that no layer owns and `container` does not name."""
        owned = {key for stored in self.layers.values() for key in stored.keys.values()} | set(self.container)
        self.plain = [key for key in keys if key not in owned]


class Dialect(Protocol):
    """One on-disk convention."""

    name: str
    summary: str
    """What it is and who reads it, in one line."""
    writes: bool
    """Whether layers can be written in it, too."""
    needs_folder: bool
    """Whether layers are described in JSON files beside the weights, so that a file alone means nothing."""
    owned_metadata: tuple[str, ...]
    """Entries of the header metadata that describe layers: removed when a file is written anew."""
    owned_configs: Mapping[str, tuple[str, ...]]
    """File name -> its top-level fields that describe layers; no fields: the whole file."""
    methods: tuple[str, ...]
    """The `quant_method`s of config.json that mean this dialect."""

    def detect(self, held: Container) -> bool:
        """Whether this is written in this dialect. Several never say so: names or fields tell them apart."""
        ...

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """The quantized layers. `read` is called for small tensors only (markers, scalars).

        Everything is checked against the headers here, before any data is read. With `strict` the first problem is
        raised (a `CheckpointError`, `PartsError`, `FormatError` or `UnknownFormatError` that names `held.where` and the
        layer); without, problems are collected and their layers left out.
        """
        ...

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """The canonical parts of a layer, checked by `Format.check`. Raises `PartsError`."""
        ...

    def refuses(self, stored: StoredLayer) -> str | None:
        """Why a layer cannot be written in this dialect, in words that follow its name, or None."""
        ...

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """Key -> spec of exactly what `store_parts` will give, before the data exists.

        `stored.keys` and `notes` may be empty; `stored.dtypes` gives dtypes of parts for which the format allows
        several, by default what `Format.quantize` makes of `stored.dtype`.
        """
        ...

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key -> tensor to be written for one layer. Raises `PartsError` for parts that are not those of its format."""
        ...

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Entries of a file's header metadata that describe its layers; `plain` are its other tensors."""
        ...

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """File name -> top-level fields that describe the layers of a whole model there; `plain`: its other tensors."""
        ...


@runtime_checkable
class ReordersBias(Protocol):
    """A dialect that keeps biases in the order of a kernel; `FoundLayers.orders` tells of those that it reads."""

    def bias_places(self, stored: StoredLayer) -> Tensor | None:
        """Where each value of the bias of a layer lies in a file, int64 [N]; None: in its natural order."""
        ...


@runtime_checkable
class NeedsDtype(Protocol):
    """A dialect whose readers decode some formats to one dtype, whatever that of the model is."""

    def model_dtype(self, formats: Iterable[Format]) -> torch.dtype | None:
        """The dtype that config.json must give a model with layers in these formats; None: any."""
        ...


def refuse_unwritable(dialect: Dialect, stored: StoredLayer) -> None:
    """Raise `PartsError` for a layer that a dialect cannot write (`Dialect.refuses`)."""
    if why := dialect.refuses(stored):
        raise PartsError(f"{stored.place}: is {stored.format}: {why}")


def needed_dtype(dialect: Dialect, formats: Iterable[Format]) -> torch.dtype | None:
    """The dtype that config.json must give a model with layers in these formats; None: any."""
    needs: object = dialect
    return needs.model_dtype(formats) if isinstance(needs, NeedsDtype) else None


def bias_orders(dialect: Dialect | None, layers: Iterable[StoredLayer]) -> dict[str, Tensor]:
    """Key of a bias -> where each of its values lies, for those of these layers that a dialect reorders."""
    reorders: object = dialect
    if not isinstance(reorders, ReordersBias):
        return {}
    places = {join_key(stored.layer, "bias"): reorders.bias_places(stored) for stored in layers}
    return {key: found for key, found in places.items() if found is not None}


_REGISTRY: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> Dialect:
    """Make a dialect known by its name; a second one of that name is refused."""
    if dialect.name in _REGISTRY:
        raise CheckpointError(f"a dialect named {dialect.name!r} is registered already")
    _REGISTRY[dialect.name] = dialect
    return dialect


def dialects() -> dict[str, Dialect]:
    """Every registered dialect by name."""
    return dict(sorted(_REGISTRY.items()))


def get_dialect(name: str) -> Dialect:
    """The dialect of that name. Raises `CheckpointError` with the names there are."""
    if name not in _REGISTRY:
        raise CheckpointError(f"unknown dialect {name!r}; known dialects: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def written_dialect(name: str) -> Dialect:
    """The dialect of that name, to write in. Raises `CheckpointError` for one that is only read, too."""
    dialect = get_dialect(name)
    if not dialect.writes:
        written = ", ".join(sorted(other for other, each in _REGISTRY.items() if each.writes))
        raise CheckpointError(f"the dialect {name} is only read; those that are written are {written}")
    return dialect


def detect_dialect(held: Container) -> Dialect | None:
    """The dialect of a model, or None for a plain one.

    Raises `CheckpointError` for a file that holds quantized weights which no dialect describes: shapes and dtypes do
    not tell the order of nibbles or scales (ComfyUI's and BFL's nvfp4 differ in nothing else), so nothing is guessed.
    """
    for dialect in _REGISTRY.values():
        if dialect.detect(held):
            return dialect
    _refuse_unknown_method(held)
    if foreign := undescribed(held.tensors, held.tensors):
        raise CheckpointError(
            f"{held.where or 'the file'}: {foreign[0]!r} and {len(foreign) - 1} more look like quantized weights, but "
            "nothing says how they are stored, and shapes cannot tell: nibbles may be swapped and scales reordered. If "
            "you know who wrote it, name its dialect (--source-dialect comfy, bfl, bfl_swapped, modelopt; "
            "`lowbit formats` lists them); if a folder's config.json describes it, name the folder; else take the "
            "16-bit file"
        )
    return None


def _refuse_unknown_method(held: Container) -> None:
    """Raise `CheckpointError` for codes that config.json says are of a method which no dialect reads."""
    config = held.configs.get("config.json", {}).get("quantization_config")
    method = str(config.get("quant_method", "")).lower() if isinstance(config, Mapping) else ""
    known = sorted({name for dialect in _REGISTRY.values() for name in dialect.methods})
    if not method or method in known:
        return
    codes = (*_CODE_DTYPES, torch.int32, torch.int16)
    coded = [key for key, spec in held.tensors.items() if len(spec.shape) > 1 and spec.dtype in codes]
    if coded:
        raise CheckpointError(
            f"{held.where or 'the file'}: config.json says quant_method {method!r}, and {coded[0]!r} is "
            f"{held.tensors[coded[0]]}; lowbit reads {', '.join(known)}. Take the 16-bit model"
        )


def undescribed(keys: Iterable[str], tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Those of `keys` that look like quantized weights: codes with a scale beside them, or another tool's names."""
    found = []
    for key in keys:
        layer = layer_of(key)
        coded = layer is not None and tensors[key].dtype in _CODE_DTYPES
        scaled = coded and any(join_key(layer or "", suffix) in tensors for suffix in _SCALES)
        if scaled or key.endswith(_FOREIGN_SUFFIXES):
            found.append(key)
    return found


def layer_of(weight_key: str) -> str | None:
    """The layer whose weight has this key, or None for the key of anything else."""
    if weight_key == "weight":
        return ""
    return weight_key.removesuffix(".weight") if weight_key.endswith(".weight") else None


def name_place(where: str, layer: str) -> str:
    """File and layer, as messages name them."""
    named = f"layer {layer!r}" if layer else "the bare layer"
    return f"{where}: {named}" if where else named


def join_key(layer: str, suffix: str) -> str:
    """The key of a layer's tensor; a bare layer has no prefix."""
    return f"{layer}.{suffix}" if layer else suffix
