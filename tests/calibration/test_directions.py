"""The random directions in which gradients are taken."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.directions import Directions


def taken(directions, shapes):
    """The rows [R, d] for targets of these shapes, one after the other."""
    return torch.cat([directions.like(torch.empty(shape)).flatten(0, -2) for shape in shapes])


@pytest.mark.parametrize("shapes", [[(24, 24)], [(5, 24)] * 4 + [(4, 24)], [(2, 3, 24), (1, 18, 24)]])
def test_as_many_as_there_are_channels_are_all_directions(shapes):
    """d rows in turn, whatever the batches, are an orthogonal matrix times sqrt(d)."""
    z = taken(Directions(3), shapes)

    torch.testing.assert_close(z @ z.mT, 24 * torch.eye(24), rtol=0, atol=1e-4)
    more = taken(Directions(3), [*shapes, (24, 24)])
    assert torch.equal(more[:24], z)
    assert float((more[24:] @ z.mT).abs().max()) > 1


@pytest.mark.parametrize("shape", [(3, 6), (3, 1), (2, 2, 6), (3, 1500), (3,)])
def test_they_have_the_second_moment_of_noise(shape):
    """Over many seeds E[z] is 0 and E[z zᵀ] is 1, of a target as a whole; widths past the limit too."""
    target = torch.empty(shape)

    z = torch.stack([Directions(seed).like(target).flatten()[-12:] for seed in range(4000)])

    assert float(z.mean(0).abs().max()) < 0.08
    assert float((z.mT @ z / len(z) - torch.eye(z.shape[1])).abs().max()) < 0.11


def test_the_seed_decides():
    """The same for the same seed, others for another."""
    target = torch.empty(4, 8)

    assert torch.equal(Directions(1).like(target), Directions(1).like(target))
    assert not torch.equal(Directions(1).like(target), Directions(2).like(target))


def test_a_target_keeps_its_shape_and_dtype():
    """A number, no samples, another width than before: each is served in its own dtype."""
    directions = Directions(0)

    for target in (torch.tensor(2.0), torch.empty(0, 4), torch.empty(3, 0), torch.empty(7, 4), torch.empty(2, 5)):
        z = directions.like(target.bfloat16())
        assert (z.shape, z.dtype) == (target.shape, torch.bfloat16)
    assert abs(float(directions.like(torch.tensor(2.0)))) == 1


@pytest.mark.parametrize("before", [0, 3, 8])
def test_they_go_on_where_they_stopped(before):
    """From a state the sequence continues to the bit, in the middle of a matrix and between two."""
    first, second = Directions(5), Directions(6)
    taken(first, [(before, 8)])

    second.restore({name: tensor.clone() for name, tensor in first.state().items()})

    assert torch.equal(taken(second, [(5, 8), (9, 8)]), taken(first, [(5, 8), (9, 8)]))
