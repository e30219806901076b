"""A kernel layout and a kernel that reads it, for tests: codes turned, [N, bytes] -> [bytes, N], and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lowbit import dispatch
from lowbit.formats.parts import raw_bytes
from lowbit.layouts import base

NAME = "toy"
VERSION = 7
FORMATS = ("fp8_e4m3", "int8", "nvfp4", "awq_w4a16", "svdquant_w4a4")
MOST_ROWS = 4096
CALLS: list[str] = []  # what the kernels were called for


def _turned(fmt, parts):
    codes = raw_bytes(parts["qdata"]).t().contiguous()
    return {**parts, "qdata": codes.view(parts["qdata"].dtype)}


def _refuses(_fmt, n, _k):
    return f"has {n} rows, more than {MOST_ROWS}" if n > MOST_ROWS else None


def _rows(_fmt, parts):
    return parts["qdata"].shape[1]


TOY = base.Layout(
    NAME,
    VERSION,
    FORMATS,
    pack=_turned,
    unpack=_turned,
    refuses=_refuses,
    stored=False,
    rows=_rows,
    alignment=16,
)


def refuses(fmt, x, parts, bias):
    """As a kernel of single floats."""
    return None if x.dtype == torch.float32 else f"x is {x.dtype}, not float32"


def linear_toy(fmt, x, parts, bias):
    """x [..., K] -> [..., N]."""
    CALLS.append("linear")
    return fmt.linear(x, _turned(fmt, parts), bias)


def embedding_toy(fmt, indices, parts, k, dtype):
    """[...] -> [..., K]."""
    CALLS.append("embedding")
    return fmt.embedding(indices, _turned(fmt, parts), k, dtype)


@contextmanager
def toy_backend(*ops: str) -> Iterator[None]:
    """Within it the cpu backend has the toy kernels of these ops ("linear", "embedding") and no others."""
    dispatch.load("eager")
    rows = dispatch._STATE.kernels
    eager = {place: [entry for entry in row if entry.backend == "eager"] for place, row in rows.items()}
    state = dispatch._State(eager, {"eager": None, "cpu": None, "triton": "not here", "cuda": "not here"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_STATE", state)
        patch.setattr(base, "_REGISTRY", {**base._REGISTRY, NAME: TOY})
        CALLS.clear()
        for name in FORMATS:
            if "linear" in ops:
                dispatch.kernel("linear", backend="cpu", format=name, layout=NAME, refuses=refuses)(linear_toy)
            if "embedding" in ops:
                dispatch.kernel("embedding", backend="cpu", format=name, layout=NAME)(embedding_toy)
        yield
