"""Marks by which a weight is known again in another dtype, and told from others."""

from __future__ import annotations

import base64

import pytest
import torch
from torch import nn

from lowbit.numerics.weight_marks import check_mark, mark_of, places, same_weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def weight(seed: int = 0, *shape: int) -> torch.Tensor:
    """A random weight."""
    return torch.randn(shape or (48, 80), generator=torch.Generator().manual_seed(seed)) / 50


@pytest.mark.parametrize("taken", FLOATS)
@pytest.mark.parametrize("used", FLOATS)
@pytest.mark.parametrize("between", FLOATS)
def test_rounding_is_no_other_weight(taken, used, between):
    """The same weight in other dtypes, rounded twice or once, small and large, is the same one."""
    for scale in (1e-4, 1.0, 3e3, 1e7):
        for seed in range(20):
            w = scale * weight(seed)
            one, other = w.to(taken), w.to(between).to(used)
            assert same_weight(mark_of(one, (48, 80)), mark_of(other, (48, 80))), (scale, seed)


def test_other_weights_are_told():
    """Another seed, a weight trained on by 3 %, one turned around, zeros: all are others."""
    w, random = weight(), weight(7)
    mark = mark_of(w, (48, 80))

    for other in (random, w + 0.03 * random, -w, torch.zeros(48, 80), w.roll(1, 0)):
        assert not same_weight(mark, mark_of(other, (48, 80)))
    assert not same_weight(mark, mark_of(weight(0, 4, 4), (4, 4)))


def test_elements_are_of_the_whole_weight():
    """The first and the last are among them, of square weights not one column alone; small weights give all."""
    found = places(4096 * 4096)

    assert (len(found), found[0], found[-1]) == (64, 0, 4096 * 4096 - 1)
    assert len({place % 4096 for place in found}) == len({place // 4096 for place in found}) == 64
    assert places(5) == [0, 1, 2, 3, 4]
    assert places(1) == [0]


def test_a_mark_takes_no_copy_and_no_order():
    """Views in another memory order have the mark of what they are."""
    w = weight()

    assert mark_of(w.t().contiguous().t(), (48, 80)) == mark_of(w, (48, 80))
    assert mark_of(nn.Parameter(w), (48, 80)) == mark_of(w, (48, 80))


def test_weights_that_are_not_here_have_none():
    """Without values, in another shape than the layer says, in 8 bits, or of a class of its own."""
    w = weight()

    class Sharded(torch.Tensor):
        pass

    assert mark_of(w.to("meta"), (48, 80)) == ""
    assert mark_of(w.flatten(), (48, 80)) == ""
    assert mark_of(w.to(torch.float8_e4m3fn), (48, 80)) == ""
    assert mark_of(w.as_subclass(Sharded), (48, 80)) == ""


@pytest.mark.parametrize("wrong", ["?", "AAA", base64.b64encode(b"ab").decode(), base64.b64encode(b"abc").decode()])
def test_damaged_marks_are_refused(wrong):
    """Text that is no base64, or of another length."""
    with pytest.raises(ValueError, match=r"mark|base64|padding|multiple"):
        check_mark(wrong, 2)
