"""The operations that have a name of their own, on the tensors of another device.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowbit import dispatch
from lowbit.formats.parts import raw_bytes
from lowbit.ops import quantize_int8_convrot_weight, quantize_int8_tensorwise
from tests.support import gaussian
from tests.support.kernel_examples import NAMED, Sizes
from tests.support.other_device import back, elsewhere, needs_stand_in, other_device, there

pytestmark = needs_stand_in


def eager(op: str) -> dispatch.Kernel:
    """Its implementation that serves every device."""
    entries = dispatch.candidates(op, dispatch.ANY_FORMAT, "cpu")
    return next(entry for entry in entries if entry.backend == "eager")


def filled(x: Any) -> Any:
    """A tensor of this kind with values that every dtype holds and no scale of which is zero."""
    if not isinstance(x, Tensor):
        return x
    if x.dtype.is_floating_point:
        return (torch.rand(x.shape) + 0.25).to(x.dtype)
    return torch.randint(1, 100, x.shape, dtype=torch.int32).to(x.dtype)


def same(found: Any, expected: Any) -> bool:
    """Whether all results are on the stand-in, with these bits."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(torch.equal(raw_bytes(back(mine)), raw_bytes(other)) for mine, other in pairs)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("op", NAMED)
def test_named_operations_run_where_their_tensors_are(op, tokens):
    """The eager implementation gives there what it gives on the CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        for example in NAMED[op](Sizes(64, 256, tokens, dtype)):
            args = tree_map(filled, example)
            expected = eager(op).run(*args)
            with other_device():
                found = eager(op).run(*there(args))
            assert same(found, expected)


def test_numbers_become_tensors_where_the_weight_is():
    """A scale that is given as a number, and chance from a seed."""
    w = gaussian(64, 256)
    with dispatch.use_backend("eager"):
        for run in (
            lambda x: quantize_int8_tensorwise(x, 0.05, 3),
            lambda x: quantize_int8_tensorwise(x, "recalculate"),
            lambda x: quantize_int8_convrot_weight(x, 256, 3),
        ):
            expected = run(w)
            with other_device():
                assert same(run(elsewhere(w)), expected)
