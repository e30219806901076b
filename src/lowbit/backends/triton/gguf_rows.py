"""dequantize, embedding and the gradient of a linear's input for gguf, bit for bit as ggml decodes its blocks.

A thread decodes units of eight bytes of codes and writes eight columns at a time: 16 bytes of bfloat16 or float16. All
rows are one run of blocks, unless rows are picked by index or columns have factors of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, gguf_blocks
from lowbit.backends.triton.embedding import refuses_indices
from lowbit.backends.triton.tuning import Arguments, Config, config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.gguf_block import GgufBlock
from lowbit.formats.parts import Parts

# Compilers for other GPUs than NVIDIA's may round a product and the sum with a zero once instead of twice.
TOLERANCE = 1e-6
_LANES = tl.constexpr(8)  # bytes of a unit
_SMALLEST = 128  # units of a program
_MANY = 16  # programs for each processor from which one may do the work of several


def _sensible(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """All where every processor has several programs, else the smallest."""
    return configs if arguments["LARGE"] else configs[:1]


@tuned(
    [config(BLOCK=_SMALLEST, warps=4, stages=1), config(BLOCK=256, warps=4, stages=1),
     config(BLOCK=512, warps=4, stages=1)],
    key=("out", "indices", "KIND", "LARGE"),
    prune=_sensible,
)  # fmt: skip
@triton.jit(do_not_specialize=("n",))
def _decode_blocks(
    raw, halves, shared, columns, indices, out, n, units, KIND: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program i of a row: its units from i * BLOCK on, of `units`. Without indices, row i of out is row i of all."""
    UNITS: tl.constexpr = KIND.columns * KIND.bits // (8 * _LANES)  # of a block
    PIECES: tl.constexpr = 8 // KIND.bits
    tiles = tl.cdiv(units, BLOCK)
    to, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    row = to
    known = True
    if indices is not None:
        row = tl.load(indices + to).to(tl.int64)
        known = (row >= 0) & (row < n)
        row = tl.where(known, row, 0)
    first = row * (units // UNITS) + tile * (BLOCK // UNITS)  # block
    raw += first * KIND.size
    if halves is not None:
        halves += first * (KIND.size // 2)
    left = tile * (BLOCK // UNITS * KIND.columns)
    out += to * (units // UNITS) * KIND.columns + left
    unit = tl.arange(0, BLOCK)
    inside = unit < units - tile * BLOCK
    block, byte = unit // UNITS, unit % UNITS * _LANES
    packed = gguf_blocks.load_unit(raw, block, byte, inside, _LANES, KIND)
    for piece in tl.static_range(PIECES):
        value = gguf_blocks.values(raw, halves, packed, block, byte, inside, piece, _LANES, KIND)
        column = block * KIND.columns + gguf_blocks.column_of(byte, piece, KIND)
        at = column[:, None] + tl.arange(0, _LANES)[None, :]
        if shared is not None:
            value *= tl.load(shared)
        if columns is not None:
            value *= tl.load(columns + left + at, mask=inside[:, None], other=0).to(tl.float32)
        if indices is not None:
            value = tl.where(known, value, float("nan"))
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True)
class Blocks:
    """A weight [n, k] as the kernel takes it."""

    n: int
    k: int
    kind: gguf_blocks.Kind
    qdata: Tensor
    shared: Tensor | None
    columns: Tensor | None

    def decode(self, out: Tensor, start: int, stop: int) -> None:
        """Rows [start, stop) -> out [stop - start, K], contiguous."""
        count, units = stop - start, self._units
        if self.columns is None:
            count, units = 1, count * units
        self._launch(out, self.qdata[start:stop], None, count, units)

    def look_up(self, out: Tensor, indices: Tensor) -> None:
        """The rows that `indices` [...] name -> out [..., K], contiguous; NaN for one that names no row."""
        if self.n:
            self._launch(out, self.qdata, indices.contiguous(), indices.numel(), self._units)
        else:  # the kernel reads row 0 in the place of one that is not there
            out.fill_(float("nan"))

    @property
    def _units(self) -> int:
        """Units of a row."""
        return self.k // self.kind.columns * gguf_blocks.held(self.kind) // _LANES.value

    def _launch(self, out: Tensor, qdata: Tensor, indices: Tensor | None, count: int, units: int) -> None:
        if not count or not units:
            return
        raw, halves = gguf_blocks.views(qdata, self.kind)
        target = device.target_of(out.device)
        _decode_blocks(
            lambda meta: (count * triton.cdiv(units, meta["BLOCK"]),),
            out.device, raw=raw, halves=halves, shared=self.shared, columns=self.columns, indices=indices, out=out,
            n=self.n, units=units, KIND=self.kind, LARGE=units * count >= _MANY * _SMALLEST * target.processors,
        )  # fmt: skip


def describe(fmt: GgufBlock, parts: Parts, k: int) -> Blocks:
    """A weight [N, k] for which `refuses` returned None."""
    columns = parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None
    kind = gguf_blocks.kind_of(fmt.type)
    return Blocks(parts["qdata"].shape[0], k, kind, parts["qdata"], parts.get("global_scale"), columns)


def refuses(fmt: GgufBlock, parts: Parts, dtype: torch.dtype) -> str | None:
    """Why the rows of a weight cannot be decoded here to a dtype, or None."""
    if fmt.type not in gguf_blocks.TYPES:
        return f"blocks of {fmt.type}; the kernel decodes {', '.join(gguf_blocks.TYPES)}"
    if dtype not in device.DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}; the decoder gives float32, bfloat16 and float16"
    if not parts["qdata"].is_contiguous():
        return "blocks with gaps between them; call contiguous() once, at load"
    return device.refuses(torch.empty(0, dtype=dtype, device=parts["qdata"].device), **parts)


def refuses_dequantize(fmt: GgufBlock, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses(fmt, parts, dtype)


@kernel("dequantize", format="gguf", backend="triton", refuses=refuses_dequantize, tolerance=TOLERANCE)
def dequantize(fmt: GgufBlock, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=parts["qdata"].device)
    describe(fmt, parts, shape[1]).decode(out, 0, shape[0])
    return out


def refuses_embedding(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses_indices(indices, parts) or refuses(fmt, parts, dtype)


@kernel("embedding", format="gguf", backend="triton", refuses=refuses_embedding, tolerance=TOLERANCE)
def embedding(fmt: GgufBlock, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    out = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    describe(fmt, parts, k).look_up(out, indices)
    return out


def refuses_gradient(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(grad, **parts) or refuses(fmt, parts, grad.dtype)


@kernel("linear_input_gradient", format="gguf", backend="triton", refuses=refuses_gradient, tolerance=6e-3)
def linear_input_gradient(fmt: GgufBlock, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad."""
    return decoded_linear.gradient_of(describe(fmt, parts, k), grad)
