"""Layers of nunchaku and of diffusers' nunchaku_lite: SVDQuant in int4 and AWQ, as their kernels want them.

    SVDQuant   qweight int8 [N, K/2], wscales [K/64, N], smooth_factor [K], proj_down [K, R], proj_up [N, R], bias [N]
    AWQ        qweight int32 [N/4, K/2], wscales [K/64, N], wzeros [K/64, N]

`layouts.nunchaku_tiles` says what lies where. Files from before the second version of nunchaku's FLUX say lora_down,
lora_up, smooth and smooth_orig. The bias of an SVDQuant layer is in the order of its tiles, too: it is given in natural
order wherever the file is read. AWQ decodes as code * scale + wzero, code 0 .. 15, so its offset here is
wzero + 8 * scale, in float32, which is exact.

Which layers have unsigned activations is not in the files: nunchaku's code has it of those after a GELU, whose names
are known; diffusers' has it of none. The nvfp4 variant (wcscales, wtscale) has no format here and is refused by name.

Both are read; nunchaku_lite is written, a model folder of diffusers whose config.json lists the layers:

    quantization_config   quant_method nunchaku_lite, compute_dtype bfloat16 or float16
      svdq_w4a4           precision int4, group_size 64, rank, targets: the layers; svdquant_w4a4, signed activations
      awq_w4a16           precision int4, group_size 64, targets: the layers; awq_w4a16 with wzeros

There is one compute_dtype and one rank for all layers. SVDQuant has whole tiles of 128 rows and columns and ranks of a
multiple of 16; AWQ has multiples of 8 rows, which a block of its kernel makes, and of 64 columns. Modules must be those
of diffusers' model: fused projections are not split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Read,
    StoredLayer,
    TensorSpec,
    bias_orders,
    join_key,
    refuse_unwritable,
    register_dialect,
)
from lowbit.checkpoint.dialects.described import (
    FIELD,
    LayerTensors,
    collect,
    quantization_config,
    tensors_by_layer,
)
from lowbit.checkpoint.dialects.nunchaku_write import (
    GROUP,
    awq_refusal,
    awq_tensors,
    half_of,
    name_of,
    one_value,
    svdquant_refusal,
    svdquant_tensors,
    vectors,
)
from lowbit.errors import PartsError
from lowbit.formats import Parts
from lowbit.formats.awq_w4a16 import MIDDLE, AwqW4A16
from lowbit.formats.parts import HALVES
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import nunchaku_tiles as tiles

LITE = "nunchaku_lite"
_ALIASES = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
_NAMES = (
    *("qweight", "wscales", "wzeros", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"),
    *("wcscales", "wtscale", *_ALIASES),
)
_SVDQUANT = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
_ROLES = {"qweight": "qdata", "wscales": "scale", "wzeros": "zero"}
_SECTIONS = {SvdquantW4A4.name: "svdq_w4a4", AwqW4A16.name: "awq_w4a16"}  # of quantization_config
_AFTER_GELU = (".mlp_fc2", ".mlp_context_fc2", ".img_mlp.net.2", ".txt_mlp.net.2")
_AFTER_GELU_IN_FLUX = (".ff.net.2", ".ff_context.net.2")  # in SDXL and Z-Image a gated unit comes before
_ORDER_NOTE = "rows are in the order of nunchaku's own model, which interleaves those of some modulation layers"


class Nunchaku:
    """Reads and writes the convention of this module's docstring; see `Dialect` and `ReordersBias`."""

    name = "nunchaku"
    summary = "diffusers' nunchaku_lite folders, and files of nunchaku: SVDQuant and AWQ in the order of their kernels"
    writes = True
    needs_folder = True
    methods: tuple[str, ...] = (LITE,)
    owned_metadata: tuple[str, ...] = (FIELD,)
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,)}

    def detect(self, held: Container) -> bool:
        """Whether there are wscales beside a qweight: nobody else has these names."""
        return any(
            key.endswith("wscales") and join_key(key.rpartition(".")[0], "qweight") in held.tensors
            for key in held.tensors
        )

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`. Biases of SVDQuant layers are in `orders`."""
        lite = quantization_config(held, LITE) is not None
        model = "" if lite else str(held.metadata.get("model_class", ""))

        def make(tensors: LayerTensors) -> StoredLayer | None:
            if "wscales" not in tensors.keys:
                return None
            named = _renamed(tensors)
            _refuse_nvfp4(named)
            if "wzeros" in named.keys:
                return _awq_layer(named, lite=lite)
            return _svdquant_layer(named, unsigned=infer_act_unsigned and not lite and _after_gelu(named.layer, model))

        found = collect(held, tensors_by_layer(held, _NAMES).values(), make, strict=strict)
        orders = bias_orders(self, found.layers.values())
        found.orders.update({key: places for key, places in orders.items() if key in held.tensors})
        return found

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        data = {role: read(key) for role, key in layer.keys.items()}
        n, k = layer.shape
        if isinstance(layer.format, AwqW4A16):
            scale, zero = (data[role][: k // GROUP].float() for role in ("scale", "zero"))
            offset = zero.double() + MIDDLE * scale.double()
            if not torch.equal(offset.float().double(), offset):
                raise PartsError(f"{layer.place}: its wzeros + 8 * wscales do not fit into float32; take the original")
            parts = {"qdata": tiles.untile_awq(data["qdata"], n, k), "scale": scale, "zero": offset.float()}
        else:
            parts = {
                "qdata": tiles.untile_codes(data["qdata"], n, k),
                "scale": tiles.untile_scales(data["scale"]),
                "smooth_factor": data["smooth_factor"][tiles.channel_places(k)],
                "proj_down": tiles.untile_down(data["proj_down"]),
                "proj_up": tiles.untile_up(data["proj_up"]),
            }
        layer.format.check(parts, layer.shape, layer.place)
        return parts

    def bias_places(self, stored: StoredLayer) -> Tensor | None:
        """See `ReordersBias.bias_places`: SVDQuant's kernel reads the bias in the order of its tiles."""
        return tiles.channel_places(stored.shape[0]) if isinstance(stored.format, SvdquantW4A4) else None

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        fmt = stored.format
        if fmt.plain != fmt:
            return "nunchaku has no place for a pre_quant_scale or input_scale; use the format without"
        if isinstance(fmt, SvdquantW4A4):
            return svdquant_refusal(fmt, stored)
        if isinstance(fmt, AwqW4A16):
            return awq_refusal(fmt, stored)
        return "nunchaku has svdquant_w4a4 and awq_w4a16, nothing else"

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        refuse_unwritable(self, stored)
        (n, k), fmt, half = stored.shape, stored.format, half_of(stored)
        if isinstance(fmt, SvdquantW4A4):
            specs = {
                "qweight": TensorSpec(torch.int8, (n, k // 2)),
                **{name: TensorSpec(half, shape) for name, shape in vectors(n, k, fmt.rank).items()},
            }
        else:
            by_group = TensorSpec(half, (k // GROUP, n))
            codes = TensorSpec(torch.int32, (n // tiles.QUAD, k // 2))
            specs = {"qweight": codes, "wscales": by_group, "wzeros": by_group}
        return {join_key(stored.layer, name): spec for name, spec in specs.items()}

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`."""
        refuse_unwritable(self, stored)
        fmt = stored.format
        fmt.check(parts, stored.shape, stored.place)
        made = svdquant_tensors(parts) if isinstance(fmt, SvdquantW4A4) else awq_tensors(stored, parts)
        return {join_key(stored.layer, name): tensor.contiguous() for name, tensor in made.items()}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing: config.json says it all."""
        return {}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """`quantization_config`. Raises `PartsError` for layers of several dtypes or ranks: there is one of each."""
        layers = list(layers)
        if not layers:
            return {}
        halves = one_value("compute_dtype", {layer.layer: str(half_of(layer)) for layer in layers})
        said: dict[str, Any] = {"quant_method": LITE, "compute_dtype": halves.removeprefix("torch.")}
        by_format = {fmt: [layer for layer in layers if layer.format.name == fmt] for fmt in _SECTIONS}
        for fmt, found in by_format.items():
            if not found:
                continue
            section: dict[str, Any] = {"precision": "int4", "group_size": GROUP}
            if fmt == SvdquantW4A4.name:
                section["rank"] = one_value("rank", {layer.layer: layer.format.config()["rank"] for layer in found})
            said[_SECTIONS[fmt]] = {**section, "targets": [layer.layer for layer in found]}
        return {"config.json": {FIELD: said}}


NUNCHAKU = Nunchaku()
register_dialect(NUNCHAKU)


def _renamed(tensors: LayerTensors) -> LayerTensors:
    """The tensors by the names of today. Raises `CheckpointError` where there are both."""
    names = {name: _ALIASES.get(name, name) for name in tensors.keys}
    if len(set(names.values())) < len(names):
        raise tensors.error("has tensors under old and new names (lora_down and proj_down, or the like); remove one")
    keys = {names[name]: key for name, key in tensors.keys.items()}
    return LayerTensors(tensors.layer, tensors.where, keys, {names[name]: s for name, s in tensors.specs.items()})


def _refuse_nvfp4(tensors: LayerTensors) -> None:
    """Raise `CheckpointError` for SVDQuant in nvfp4."""
    scales = tensors.specs["wscales"]
    if scales.dtype == torch.float8_e4m3fn or tensors.keys.keys() & {"wcscales", "wtscale"}:
        raise tensors.error(
            f"is SVDQuant in nvfp4 (wscales {scales}), and lowbit has no format for it: only int4 is read. Take the "
            "int4 file of this model, or the 16-bit one"
        )


def _svdquant_layer(tensors: LayerTensors, *, unsigned: bool) -> StoredLayer:
    tensors.need(*_SVDQUANT)
    specs, halves = tensors.specs, tensors.specs["wscales"].dtype
    codes, down = specs["qweight"], specs["proj_down"]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or len(down.shape) != 2 or halves not in HALVES:
        raise tensors.error(
            f"its qweight is {codes}, its wscales {specs['wscales']} and its proj_down {down}; expected int8 "
            "[N, K / 2] and 16-bit floats. Download the file again"
        )
    n, k, rank = codes.shape[0], 2 * codes.shape[1], down.shape[1]
    if n % tiles.ROWS or k % tiles.ROWS or rank % tiles.LOW_RANK or not rank:
        raise tensors.error(
            f"is {n} x {k} of rank {rank}; nunchaku has whole tiles of {tiles.ROWS} rows and columns and ranks of a "
            f"multiple of {tiles.LOW_RANK} above 0. Download the file again"
        )
    shapes = vectors(n, k, rank)
    _check_shapes(tensors, shapes)
    fmt = SvdquantW4A4(rank=rank, act_unsigned=unsigned)
    notes = ["activations taken as unsigned: the layer comes after a GELU"] if unsigned else []
    dtypes = {role: specs[name].dtype for name, role in _roles(shapes).items()}
    return _stored(tensors, fmt, (n, k), halves, dtypes, notes)


def _awq_layer(tensors: LayerTensors, *, lite: bool) -> StoredLayer:
    tensors.need("qweight", "wscales", "wzeros")
    specs, scales = tensors.specs, tensors.specs["wscales"]
    codes = specs["qweight"]
    if codes.dtype != torch.int32 or len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in HALVES:
        raise tensors.error(
            f"its qweight is {codes} and its wscales {scales}; expected int32 [N / 4, K / 2] and 16-bit floats "
            "[K / 64, N]. Download the file again"
        )
    n, k = codes.shape[0] * tiles.QUAD, 2 * codes.shape[1]
    if k % GROUP or scales.shape[1] != n or scales.shape[0] < k // GROUP:
        raise tensors.error(
            f"its wscales is {scales}, expected [{k // GROUP}, {n}] for a weight {n} x {k} in groups of 64"
        )
    _check_shapes(tensors, {"wzeros": scales.shape})
    dtypes = {"scale": torch.float32, "zero": torch.float32}
    fmt = AwqW4A16(group_size=GROUP, wzeros=name_of(scales.dtype))
    return _stored(tensors, fmt, (n, k), scales.dtype, dtypes, [] if lite else [_ORDER_NOTE])


def _stored(
    tensors: LayerTensors,
    fmt: SvdquantW4A4 | AwqW4A16,
    shape: tuple[int, int],
    dtype: torch.dtype,
    dtypes: dict[str, torch.dtype],
    notes: list[str],
) -> StoredLayer:
    keys = {role: tensors.keys[name] for name, role in _roles(tensors.keys).items()}
    return StoredLayer(tensors.layer, fmt, shape, dtype, keys=keys, notes=notes, where=tensors.where, dtypes=dtypes)


def _roles(names: Mapping[str, Any]) -> dict[str, str]:
    return {name: _ROLES.get(name, name) for name in names}


def _check_shapes(tensors: LayerTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless these tensors have these shapes and 16-bit dtypes."""
    for name, shape in shapes.items():
        spec = tensors.specs[name]
        if spec.shape != shape or spec.dtype not in HALVES:
            wanted = TensorSpec(tensors.specs["wscales"].dtype, shape)
            raise tensors.error(f"its {name} is {spec}, expected {wanted}; download the file again")


def _after_gelu(layer: str, model: str) -> bool:
    """Whether nunchaku rounds the input of a layer to unsigned codes, by the name of the layer and of the model."""
    name = f".{layer}"
    return name.endswith(_AFTER_GELU) or ("flux" in model.lower() and name.endswith(_AFTER_GELU_IN_FLUX))
