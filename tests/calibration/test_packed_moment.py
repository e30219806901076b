"""Second moments in 16 bits: how wrong they are, and what must not get lost on the way."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

import lowbit
from lowbit.calibration import Collected, StatisticsFile, stored
from lowbit.calibration.collection import Contents, InputFacts, LayerInput
from lowbit.calibration.packed_moment import pack_moment, packed_size, unpack_moment
from lowbit.errors import StatisticsError
from lowbit.solvers import Statistics
from tests.calibration.models import Chain, batches
from tests.support.other_device import DEVICE, needs_stand_in

HALF_A_STEP = 0.5 / 32767


def moment_of(k, rows=2000, seed=0):
    """E[x xᵀ] of channels from 1e-2 to 1e2 with a mean, so that they are correlated; symmetric."""
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, k, generator=random) + 0.5) * torch.logspace(-2, 2, k)
    moment = x.mT @ x / rows
    return moment.triu() + moment.triu(1).mT


def again(moment):
    """Packed and unpacked."""
    return unpack_moment(*pack_moment(moment, "layer"))


@pytest.mark.parametrize("k", [1, 7, 63, 64, 65, 200, 600])
def test_what_is_lost(k):
    """The diagonal is exact; a correlation is wrong by half a step at most; the matrix is symmetric to the bit."""
    moment = moment_of(k)

    diagonal, packed = pack_moment(moment, "layer")
    found = unpack_moment(diagonal, packed)

    assert (packed.dtype, packed.numel()) == (torch.int16, packed_size(k))
    assert torch.equal(found.diagonal(), moment.diagonal())
    assert torch.equal(found, found.mT)
    size = diagonal.double().sqrt()
    assert float(((found - moment).double().abs() / (size[:, None] * size)).max()) < HALF_A_STEP + 2e-7


def test_a_quarter_of_the_room():
    """Of a matrix of a few hundred channels and more."""
    assert 2 * packed_size(3072) < 0.26 * 4 * 3072**2
    assert 2 * packed_size(384) < 0.3 * 4 * 384**2


@pytest.mark.parametrize("k", [5, 64, 130])
def test_packing_again_changes_nothing(k):
    """What was unpacked packs to the same bits, so files may be copied and merged any number of times."""
    once = pack_moment(moment_of(k), "layer")

    twice = pack_moment(unpack_moment(*once), "layer")

    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_channels_that_are_always_alike():
    """Correlations of 1 and -1 come back as they are, and so does a matrix of rank one."""
    x = torch.tensor([[1.0, -2.0, 3.0, 1e-3, 1e4]])

    torch.testing.assert_close(again(x.mT @ x), x.mT @ x, rtol=1e-6, atol=0)


def test_channels_that_are_always_zero():
    """They stay zero, and nothing else changes; so do channels of which float32 has next to no bits."""
    moment = moment_of(70)
    moment[3] = moment[:, 3] = 0
    small = torch.tensor([[1e-40, 1e-21], [1e-21, 1.0]])

    found = again(moment)

    assert not found[3].any()
    assert not found[:, 3].any()
    assert bool(found.isfinite().all())
    assert torch.equal(again(small), torch.tensor([[1e-40, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(3, 90), (66, 66), (0, 0)])
def test_what_is_not_finite_stays_so(bad, place):
    """One such value anywhere and the matrix that comes back has some too: solvers look for them."""
    moment = moment_of(100)
    moment[place] = moment[place[::-1]] = bad

    found = again(moment)

    assert not bool(found.isfinite().all())
    kept = [channel for channel in range(100) if channel not in place]
    assert bool(found[kept][:, kept].isfinite().all())
    torch.testing.assert_close(again(found), found, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_second_moment_is_refused():
    """A value beyond what the channels' sizes allow cannot be stored, and is no E[x xᵀ]; rounding's excess is cut."""
    moment = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    almost = torch.tensor([[1.0, 1.001], [1.001, 1.0]])

    with pytest.raises(StatisticsError, match=r"blocks\.0\.up: its second moments are none.*1\.5 times"):
        pack_moment(moment, "blocks.0.up")
    assert torch.equal(again(almost), torch.ones(2, 2))


def test_the_layer_is_named():
    """Statistics made by hand that are none are an error of the first layer with the input."""
    contents = Contents("m", {"a": LayerInput("0", (4, 2)), "b": LayerInput("0", (3, 2))}, {"0": FACTS})

    with pytest.raises(StatisticsError, match=r"^a: its second moments"):
        Collected(contents, {"0": Statistics(hessian=torch.tensor([[1.0, 9.0], [9.0, 1.0]]), tokens=5)})


def test_layers_are_gone_through_once_to_name_them():
    """A model with many experts has as many inputs: to look among all layers for each took seconds."""

    class Layers(dict):
        times = 0

        def items(self):
            self.times += 1
            return super().items()

    layers = Layers({name: LayerInput(str(i // 2), (3, 2), f"g{i}") for i, name in enumerate("abcd")})
    contents = Contents("m", layers, {"0": FACTS, "1": FACTS})

    found = [contents.first_with(key) for key in ("0", "1", "g1", "g3", "other")]

    assert found == ["a", "c", "b", "d", "other"]
    assert layers.times == 1


FACTS = InputFacts(2, 5, 0, "full")


def test_memory_and_file_give_the_same_bits(tmp_path):
    """What solvers see does not depend on where statistics are kept."""
    contents = Contents("m", {"a": LayerInput("0", (4, 96))}, {"0": InputFacts(96, 5, 7, "full")})
    whole = Statistics(hessian=moment_of(96), tokens=5, held_out=moment_of(96, seed=1), held_out_tokens=7)
    collected = Collected(contents, {"0": whole})

    with StatisticsFile(collected.save(tmp_path / "s.safetensors")) as file:
        for name in ("hessian", "held_out"):
            assert torch.equal(getattr(file["a"], name), getattr(collected["a"], name))
    assert (tmp_path / "s.safetensors").stat().st_size < 0.5 * 2 * 4 * 96**2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_statistics_in_memory_can_be_copied_and_pickled(copied):
    """Also once a layer was asked for; what is asked for next is the same."""
    contents = Contents("m", {"a": LayerInput("0", (4, 2))}, {"0": FACTS})
    collected = Collected(contents, {"0": Statistics(hessian=moment_of(2), tokens=5)})
    before = collected["a"].hessian

    found = copied(collected)

    assert found.contents == contents
    assert torch.equal(found["a"].hessian, before)


def test_taken_moments_are_packed_one_after_the_other(monkeypatch):
    """Whole and packed ones of all layers at once would take a quarter more than what calibration needs."""
    alive, own = [], stored.pack_moment
    most = 0

    def counted(moment, where):
        nonlocal most
        alive.append(weakref.ref(moment))
        most = max(most, sum(one() is not None for one in alive))
        return own(moment, where)

    monkeypatch.setattr(stored, "pack_moment", counted)
    lowbit.calibrate(Chain((24, 16, 20, 12, 8)), batches(), gradients=True)

    assert len(alive) == 16
    assert most <= 4  # both halves of an input or output, and of the one before


@needs_stand_in
def test_moments_on_another_device():
    """They are packed where they are."""
    moment = moment_of(130)

    diagonal, packed = pack_moment(moment.to(DEVICE), "layer")

    assert packed.device.type == diagonal.device.type == torch.device(DEVICE).type
    assert torch.equal(unpack_moment(diagonal, packed).cpu(), again(moment))
