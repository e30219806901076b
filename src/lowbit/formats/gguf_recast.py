"""GGUF blocks and other formats with the same codes: taken apart and put together without choosing a code anew.

Q4_0 Q5_0 Q8_0    wna16 of 4, 5 or 8 bits in groups of 32, with float16 scales; only from blocks
MXFP4             mxfp4, both ways
NVFP4             nvfp4, both ways; a scale of the tensor is its global scale, and without one that is 1

Values are the same but for the sign of zeros, and, where NVFP4 has a global scale other than a power of two, for the
last bit of a float32: ggml multiplies by it last. A block scale that is NaN in nvfp4 is 0 to ggml.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.registry import parse_spec
from lowbit.numerics.gguf_blocks import BlockType, block_type

SAME_CODES = {
    "Q4_0": "wna16(bits=4,group_size=32)",
    "Q5_0": "wna16(bits=5,group_size=32)",
    "Q8_0": "wna16(bits=8,group_size=32)",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}
_TO_BLOCKS = {"mxfp4": "gguf(type=MXFP4)", "nvfp4": "gguf(type=NVFP4,global_scale=true)"}
_NAN = 0x7F  # of e4m3


def take_apart(kind: BlockType, parts: Mapping[str, Tensor], other: Format) -> Parts:
    """The own parts of `other`, the format of the same codes, of blocks uint8 [N, row bytes]."""
    qdata = parts["qdata"]
    count = qdata.shape[1] // kind.size
    blocks = qdata.reshape(qdata.shape[0] * count, kind.size)
    codes = kind.codes(blocks).reshape(qdata.shape[0], count * kind.columns)
    headers = kind.headers(blocks).reshape(qdata.shape[0], count * kind.header_size).contiguous()
    if kind.name == "Q8_0":
        codes = codes ^ 0x80  # two's complement, with 128 for 0
    out = {"qdata": other.pack(codes)}
    if kind.name == "MXFP4":
        return {**out, "scale": headers}
    if kind.name == "NVFP4":
        scale = headers & 0x7F
        scale = scale.masked_fill_(scale == _NAN, 0).view(torch.float8_e4m3fn)
        whole = parts.get("global_scale", torch.ones((), device=qdata.device))
        return {**out, "scale": scale, "global_scale": whole}
    return {**out, "scale": headers.view(torch.float16)}


def block_format(fmt: Format, shape: tuple[int, int]) -> Format | None:
    """The format of blocks that holds a weight of this shape with the codes that it has in `fmt`, or None."""
    spec = _TO_BLOCKS.get(fmt.spec)
    found = None if spec is None else parse_spec(spec)
    return found if found is not None and found.check_shape(*shape) is None else None


def put_together(fmt: Format, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str) -> Parts:
    """The parts in `block_format(fmt, shape)`. Raises `PartsError` for scales that ggml reads as others."""
    kind = block_type("MXFP4" if fmt.name == "mxfp4" else "NVFP4")
    codes = fmt.unpack(parts["qdata"], shape[1])[:, : shape[1]]
    headers = parts["scale"].view(torch.uint8)
    if kind.name == "NVFP4" and bool((headers >= _NAN).any()):
        raise PartsError(
            f"{where}: has block scales that are negative or NaN, which GGUF cannot hold; quantize it anew"
        )
    count = shape[1] // kind.columns
    blocks = kind.join(
        codes.reshape(shape[0] * count, kind.columns), headers.reshape(shape[0] * count, kind.header_size)
    )
    out = {"qdata": blocks.reshape(shape[0], count * kind.size)}
    return {**out, "global_scale": parts["global_scale"]} if kind.name == "NVFP4" else out
