"""Codes of any width packed densely: element i of a row lies in bits [i b, (i + 1) b), the lowest bit first.

Eight codes fill `bits` whole bytes, so rows are padded to a multiple of eight codes. Eight bytes with a code each are
one 64-bit word, and three steps push its codes together, each joining neighbours of twice the width of those before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

CODES = 8  # in a word
_LOW_LANES = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}


def packed_bytes(k: int, bits: int) -> int:
    """Bytes of a row of k codes: eight codes take `bits` of them."""
    return -(-k // CODES) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[..., K] uint8 codes (their lower `bits` count, 1 to 8) -> [..., ceil(K / 8) * bits] uint8.

    A K that is no multiple of 8 is padded with zero codes.
    """
    if codes.shape[-1] % CODES:
        codes = F.pad(codes, (0, -codes.shape[-1] % CODES))
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        return pack_nibbles(codes.clone() if codes.storage_offset() % 2 else codes)  # it wants an even start
    shape = (*codes.shape[:-1], codes.shape[-1] // CODES * bits)
    # Flat, and in new memory: a view of another width wants an aligned start and strides that short axes may not have.
    words = (codes & ((1 << bits) - 1)).contiguous().view(-1).view(torch.int64)
    for lane, low in _LOW_LANES.items():
        held = lane // 8 * bits  # of a lane; its other bits are empty, and its upper neighbour moves down over them
        words = (words & low) | ((words >> (lane - held)) & (low << held))
    return words.view(torch.uint8).view(-1, CODES)[:, :bits].reshape(shape)


def unpack_bits(packed: Tensor, bits: int, columns: int | None = None) -> Tensor:
    """[..., P] bytes, P a multiple of `bits` -> [..., columns or 8 P / bits] uint8 codes: `pack_bits` undone."""
    if bits == 8:
        codes = packed.view(torch.uint8)
    elif bits == 4:
        codes = unpack_nibbles(packed)
    else:
        groups = packed.numel() // bits
        spread = torch.zeros((groups, CODES), dtype=torch.uint8, device=packed.device)
        spread[:, :bits] = packed.view(torch.uint8).reshape(groups, bits)
        words = spread.view(-1).view(torch.int64)
        for lane in reversed(_LOW_LANES):
            held = lane // 8 * bits
            lower = sum(((1 << held) - 1) << start for start in range(0, 64, 2 * lane))
            words = (words & lower) | ((words & (lower << held)) << (lane - held))
        codes = words.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] // bits * CODES)
    return codes if columns is None or columns == codes.shape[-1] else codes[..., :columns]
