from __future__ import annotations

import torch

from lowbit.backends import gpu
from lowbit.backends.gpu import Target, assume


def test_every_one_has(monkeypatch):
    """The oldest of a machine's GPUs decides; an assumed one stands for all of them."""
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(gpu, "_read", lambda kind, index: Target(kind, capabilities[index]))
    assert gpu.every_one_has((7, 5))
    assert not gpu.every_one_has((8, 0))
    with assume(Target("cuda", (8, 0))):
        assert gpu.every_one_has((8, 0))
        assert not gpu.every_one_has((9, 0))
