"""Every spec that the registered formats give a golden number for: what contract tests loop over."""

from __future__ import annotations

import torch

from lowbit.formats import Format, Parts, formats, parse_spec

ALL_SPECS = [spec for cls in formats().values() for spec in cls.golden_sqnr]
# What can be read but not made.
READ_ONLY_SPECS = ["gguf(type=NVFP4,global_scale=true)"]


def any_parts(fmt: Format, shape: tuple[int, int], seed: int = 0) -> Parts:
    """Parts of any content for a format that cannot make its own.

    Bit 6 of each byte is zero, so that no scale among them is infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = fmt.empty_parts(shape, torch.device("cpu"))
    for name, part in parts.items():
        if part.dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, part.shape, generator=generator, dtype=torch.uint8) & 0xBF
        else:
            parts[name] = torch.rand(part.shape, generator=generator).to(part.dtype)
    return parts


def fits(spec: str, k: int) -> bool:
    """Whether a format holds weights of K columns."""
    return parse_spec(spec).check_shape(48, k) is None


# One for each registered format: its default, or else the first golden variant that holds few columns.
SMALL_SPECS = [next(s for s in (name, *cls.golden_sqnr) if fits(s, 64)) for name, cls in formats().items()]


def weight_shape(fmt: Format) -> tuple[int, int]:
    """A small odd N and the smallest multi-group K that the format can hold."""
    for k in (40, 64, 128, 256, 512, 1024, 2048):
        if fmt.check_shape(48, k) is None and k >= 40:
            return 48, k
    raise AssertionError(f"{fmt} holds none of the tried K")
