"""Kernel layouts: one file each, a pack and unpack pair with a name and a version."""

from lowbit.layouts import (
    coalesced_int4,
    gguf_rows16,
    rows16,
    rows16_w4a8,
    svdquant_fragments,
    svdquant_tiles,
    words128,
)

__all__ = [
    "coalesced_int4",
    "gguf_rows16",
    "rows16",
    "rows16_w4a8",
    "svdquant_fragments",
    "svdquant_tiles",
    "words128",
]
