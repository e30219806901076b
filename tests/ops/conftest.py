"""What tests of several ops need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def _compare_float8(monkeypatch):
    """opcheck compares tensors by allclose, which float8 lacks: compare those by their bytes."""
    real = torch.allclose

    def allclose(a, b, **options):
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dtype.itemsize == 1 else real(a, b, **options)

    monkeypatch.setattr(torch, "allclose", allclose)
