"""Kernel layouts: one file each, a pack and unpack pair with a name and a version."""

from lowbit.layouts import svdquant_tiles

__all__ = ["svdquant_tiles"]
