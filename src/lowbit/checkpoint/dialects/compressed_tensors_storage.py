"""The tensors of each storage of compressed-tensors, and the canonical parts they hold.

`roles` maps a stored name to a part; `write` and `read` are exact inverses of each other.
"""

# ruff: noqa: D102  (the methods are documented in `Storage`)

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.checkpoint.dialects.base import Read, Shape, StoredLayer, TensorSpec
from lowbit.checkpoint.dialects.compressed_tensors_schemes import Scheme
from lowbit.checkpoint.dialects.described import LayerTensors
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import Parts
from lowbit.numerics.bit_packing import CODES, pack_bits, packed_bytes, unpack_bits
from lowbit.numerics.groups import ceil_div

SHAPE = "weight_shape"
_WORD = 4  # bytes of an int32
_PACKED = ("weight_packed", "weight_scale", SHAPE, "weight_zero_point", "weight_g_idx", "weight_global_scale")
ALL_SUFFIXES = frozenset({"weight", *_PACKED})


class Storage:
    """How the layers of one scheme lie in a file. As it is: one byte a code, with a scale."""

    codes = "weight"
    """The stored name of the codes."""
    activations = "input_scale"
    """The stored name of a static scale for the input."""
    roles: Mapping[str, str] = {"weight": "qdata", "weight_scale": "scale"}

    def also_needs(self, scheme: Scheme) -> Sequence[str]:
        """Stored names without which a layer of this scheme means nothing, beside codes and scale."""
        return ()

    def shape_of(self, tensors: LayerTensors, scheme: Scheme, read: Read) -> Shape:
        """The logical shape [N, K]."""
        return tensors.matrix(self.codes)

    def refuses(self, stored: StoredLayer) -> str | None:
        """Why a layer of this shape has no place, or None."""
        return None

    def specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """Part -> what `write` gives."""
        fmt = stored.format
        blank = fmt.empty_parts(stored.shape, torch.device("meta"), stored.dtype)
        return {part: TensorSpec.of(tensor) for part, tensor in self.write(stored, blank).items()}

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> Parts:
        """Stored tensors by part, of canonical parts."""
        written = dict(parts)
        for name in ("scale", "input_scale", "global_scale"):
            if name in parts and not parts[name].dim():
                written[name] = parts[name].reshape(1)
        written["scale"] = written["scale"].to(stored.dtypes.get("scale", written["scale"].dtype))
        return written

    def read(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> Parts:
        """Canonical parts of stored tensors."""
        rules = {rule.name: rule for rule in stored.format.rules}
        parts = dict(tensors)
        for name in ("scale", "input_scale", "global_scale"):
            if name in parts and not rules[name].dims:
                parts[name] = parts[name].reshape(())
            if name in parts and parts[name].dtype not in rules[name].dtypes:
                parts[name] = parts[name].to(rules[name].dtypes[0])
        return parts


class Groups(Storage):
    """mxfp8: the codes fill whole groups here, and the shape is not stored."""

    def refuses(self, stored: StoredLayer) -> str | None:
        k = stored.shape[1]
        width = 32 if stored.format.name.startswith("mx") else 16
        return f"it has {k} columns, and compressed-tensors wants a multiple of {width}" if k % width else None

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> Parts:
        written = dict(parts)
        if "global_scale" in parts:
            written["global_scale"] = parts["global_scale"].reshape(1)
        if "input_scale" in parts:
            written["input_scale"] = parts["input_scale"].reshape(1)
        return written


class Nibbles(Groups):
    """nvfp4 and mxfp4: two codes a byte, the even column in the low nibble."""

    codes = "weight_packed"
    activations = "input_global_scale"
    roles: Mapping[str, str] = {
        "weight_packed": "qdata",
        "weight_scale": "scale",
        "weight_global_scale": "global_scale",
    }

    def also_needs(self, scheme: Scheme) -> Sequence[str]:
        return ("weight_global_scale",) if scheme.strategy == "tensor_group" else ()

    def shape_of(self, tensors: LayerTensors, scheme: Scheme, read: Read) -> Shape:
        n, width = tensors.matrix(self.codes)
        return n, 2 * width


class Packed(Storage):
    """wna16: codes in int32 words along K, zero points in words along N, the shape beside them."""

    codes = "weight_packed"
    roles: Mapping[str, str] = {
        "weight_packed": "qdata",
        "weight_scale": "scale",
        SHAPE: "shape",
        "weight_zero_point": "zero_point",
        "weight_g_idx": "g_idx",
    }

    def also_needs(self, scheme: Scheme) -> Sequence[str]:
        return (SHAPE,) if scheme.get("symmetric", True) else (SHAPE, "weight_zero_point")

    def shape_of(self, tensors: LayerTensors, scheme: Scheme, read: Read) -> Shape:
        spec, bits = tensors.specs[SHAPE], scheme.get("num_bits", 4)
        if spec.shape != (2,):
            raise tensors.error(f"{SHAPE} is {spec}, expected two sizes; download the file again")
        n, k = (int(size) for size in read(tensors.keys[SHAPE]).tolist())
        words, loose = ceil_div(k * bits, 8 * _WORD), ceil_div(k, 8 * _WORD // bits)
        width = tensors.specs[self.codes].shape
        if width == (n, loose) != (n, words):
            raise tensors.error(
                f"its {bits}-bit codes are packed {8 * _WORD // bits} to a word, as old versions of compressed-tensors "
                "did, and with the current ones no program reads them; save the model with a current version"
            )
        if width != (n, words):
            raise tensors.error(
                f"weight_packed is {tensors.specs[self.codes]}, expected [{n}, {words}] for {n} x {k} weights of "
                f"{bits} bits; download the file again"
            )
        return n, k

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> Parts:
        config = stored.format.config()
        bits, (n, k) = config["bits"], stored.shape
        words = ceil_div(k * bits, 8 * _WORD)
        written = {"qdata": _words(_filled(parts["qdata"], bits, k, None), words), "scale": parts["scale"]}
        written["scale"] = written["scale"].to(stored.dtypes.get("scale", written["scale"].dtype))
        shape = torch.tensor([n, k], dtype=torch.int64)
        written["shape"] = shape.to("meta") if parts["qdata"].is_meta else shape
        if "zero_point" in parts:
            written["zero_point"] = self._packed_zeros(stored, parts["zero_point"], bits)
        if "g_idx" in parts:
            written["g_idx"] = parts["g_idx"]
        return written

    def _packed_zeros(self, stored: StoredLayer, zeros: Tensor, bits: int) -> Tensor:
        n, groups = zeros.shape
        words = ceil_div(n * bits, 8 * _WORD)
        if zeros.is_meta:
            return torch.empty((words, groups), dtype=torch.int32, device="meta")
        if bool((zeros >> bits).any()) if bits < 8 else False:
            raise PartsError(
                f"{stored.place}: has a zero point of {int(zeros.max())}, and compressed-tensors stores {bits} bits"
            )
        return _words(pack_bits(zeros.t().contiguous(), bits), words).t()

    def read(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> Parts:
        config = stored.format.config()
        bits, (n, k) = config["bits"], stored.shape
        parts = {name: tensor for name, tensor in tensors.items() if name != "shape"}
        parts["qdata"] = _bytes(tensors["qdata"], packed_bytes(k, bits))
        if "zero_point" in tensors:
            packed = _bytes(tensors["zero_point"].t().contiguous(), packed_bytes(n, bits))
            parts["zero_point"] = unpack_bits(packed, bits, n).t().contiguous()
        parts["qdata"] = _filled(parts["qdata"], bits, k, _last_zero(parts, n, bits))
        return parts


class Bytes(Packed):
    """wna16 of which each code has a signed byte of its own."""

    codes = "weight"
    roles: Mapping[str, str] = {
        "weight": "qdata",
        "weight_scale": "scale",
        "weight_zero_point": "zero_point",
        "weight_g_idx": "g_idx",
    }

    def also_needs(self, scheme: Scheme) -> Sequence[str]:
        return () if scheme.get("symmetric", True) else ("weight_zero_point",)

    def shape_of(self, tensors: LayerTensors, scheme: Scheme, read: Read) -> Shape:
        return tensors.matrix(self.codes)

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> Parts:
        bits, (n, k) = stored.format.config()["bits"], stored.shape
        written = super(Packed, self).write(stored, parts)
        if parts["qdata"].is_meta:
            written["qdata"] = torch.empty((n, k), dtype=torch.int8, device="meta")
        else:
            written["qdata"] = _signed(unpack_bits(parts["qdata"], bits, k), bits)
        if "zero_point" in parts:
            zeros = parts["zero_point"]
            written["zero_point"] = zeros.view(torch.int8) if zeros.is_meta else _signed(zeros, bits)
        return written

    def read(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> Parts:
        bits = stored.format.config()["bits"]
        parts = dict(tensors)
        n, k = stored.shape
        parts["qdata"] = pack_bits(_unsigned(tensors["qdata"], bits, stored), bits)
        if "zero_point" in tensors:
            parts["zero_point"] = _unsigned(tensors["zero_point"], bits, stored)
        parts["qdata"] = _filled(parts["qdata"], bits, k, _last_zero(parts, n, bits))
        return parts


def _last_zero(parts: Mapping[str, Tensor], n: int, bits: int) -> Tensor:
    """The code [N, 1] that stands for 0 in the last group of each row."""
    if "zero_point" in parts:
        return parts["zero_point"][:, -1:]
    return torch.full((n, 1), 1 << (bits - 1), dtype=torch.uint8, device=parts["qdata"].device)


def _filled(packed: Tensor, bits: int, k: int, code: Tensor | None) -> Tensor:
    """Rows of packed codes whose last ones, beyond K, are `code` [N, 1], or 0 bits: each side has its own custom."""
    beyond = -k % CODES
    if not beyond or packed.is_meta:
        return packed
    codes = unpack_bits(packed, bits, k)
    fill = codes.new_zeros((codes.shape[0], beyond)) if code is None else code.expand(-1, beyond)
    return pack_bits(torch.cat([codes, fill], dim=1), bits)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes.to(torch.int16).sub_(1 << (bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, bits: int, stored: StoredLayer) -> Tensor:
    shifted = codes.to(torch.int16).add_(1 << (bits - 1))
    if shifted.numel() and (int(shifted.min()) < 0 or int(shifted.max()) >= 1 << bits):
        raise PartsError(f"{stored.place}: has codes that {bits} bits do not hold; download the file again")
    return shifted.to(torch.uint8)


def _words(packed: Tensor, words: int) -> Tensor:
    """Rows of bytes as int32 words, cut or filled with zeros to `words` of them: what is cut holds no code."""
    size = words * _WORD
    if packed.is_meta:
        return torch.empty((packed.shape[0], words), dtype=torch.int32, device="meta")
    rows = F.pad(packed, (0, size - packed.shape[1]))
    return rows.clone(memory_format=torch.contiguous_format).view(-1).view(torch.int32).view(rows.shape[0], words)


def _bytes(words: Tensor, size: int) -> Tensor:
    """The inverse of `_words`: rows of `size` bytes."""
    packed = words.contiguous().view(torch.uint8)
    return F.pad(packed, (0, size - packed.shape[1])).contiguous()  # a negative length cuts


_PLAIN, _NIBBLES, _PACKED_WORDS = Storage(), Nibbles(), Packed()
_BY_NAME: dict[str, Storage] = {
    "pack-quantized": _PACKED_WORDS,
    "nvfp4-pack-quantized": _NIBBLES,
    "mxfp4-pack-quantized": _NIBBLES,
    "mxfp8-quantized": Groups(),
    "float-quantized": _PLAIN,
    "int-quantized": _PLAIN,
    "naive-quantized": _PLAIN,
}
_BYTES = Bytes()


def storage_of(scheme: Scheme, place: str) -> Storage:
    """The storage of a scheme. Raises `CheckpointError` for a name that is not known."""
    if scheme.name not in _BY_NAME:
        raise CheckpointError(
            f"{place}: the format {scheme.name!r} of compressed-tensors is unknown; known are "
            f"{', '.join(sorted(_BY_NAME))}. Take the 16-bit model, or one in another format"
        )
    storage = _BY_NAME[scheme.name]
    integers = storage is _PLAIN and scheme.get("type", "int") == "int"
    small = scheme.get("num_bits", 8) < 8 or not scheme.get("symmetric", True) or scheme.strategy == "group"
    return _BYTES if integers and small else storage
