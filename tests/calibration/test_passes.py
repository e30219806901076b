"""Calibration that does not fit into memory, or is interrupted."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.calibration.accumulate import state_bytes
from lowbit.errors import StatisticsError
from tests.calibration.models import Attention, Chain, batches, same

ONE = state_bytes(160, full=True)  # memory for the largest input of `Chain`


@pytest.fixture
def model():
    """The chain with the same weights every time."""
    torch.manual_seed(1)
    return Chain((160, 160, 160, 160, 32))


DATA = batches(6, width=160)


class Dies(Exception):  # noqa: N818  (it stands for a killed process)
    """Raised in the middle of a run."""


def dying(data, after):
    """The batches as a re-iterable whose `after`-th item over all passes raises."""

    class Batches:
        served = 0

        def __iter__(self):
            for x in data:
                if Batches.served == after:
                    raise KeyboardInterrupt
                Batches.served += 1
                yield x

    return Batches()


@pytest.mark.parametrize("memory", [ONE, 2 * ONE, "64MiB", None])
def test_the_result_does_not_depend_on_the_number_of_passes(model, tmp_path, memory):
    """With room for one input at a time, for some or for all, the same bits come out."""
    passes = []

    found = lowbit.calibrate(
        model,
        DATA,
        path=tmp_path / "s.safetensors",
        memory=memory,
        progress=lambda _done, _total, what: passes.append(what),
    )

    assert same(found, lowbit.calibrate(model, DATA))
    assert len(set(passes)) == {ONE: 4, 2 * ONE: 2}.get(memory, 1)


@pytest.mark.parametrize("after", [0, 3, 6, 8, 13, 20])
def test_an_interrupted_run_goes_on(model, tmp_path, after):
    """Stopped in any pass, the same call ends with the same bits, and runs no batch before the last snapshot again."""
    path = tmp_path / "s.safetensors"
    options = {"path": path, "memory": ONE, "snapshot_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(DATA, after), **options)
    assert not path.exists()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    found = lowbit.calibrate(model, DATA, **options)

    assert len(calls) == 4 * len(DATA) - after
    assert same(found, lowbit.calibrate(model, DATA))
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_the_interrupted_file_is_byte_identical(model, tmp_path):
    """A run that was stopped twice writes the same bytes as one that was not."""
    straight, stopped = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lowbit.calibrate(model, DATA, path=straight, memory=ONE).close()
    for after in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            lowbit.calibrate(model, dying(DATA, after), path=stopped, memory=ONE, snapshot_every=0.0)

    lowbit.calibrate(model, DATA, path=stopped, memory=ONE, snapshot_every=0.0).close()

    assert straight.read_bytes() == stopped.read_bytes()


def test_other_data_or_options_start_afresh(model, tmp_path, caplog):
    """What an interrupted run left is not used for other batches, another model or other options, and that is said."""
    path = tmp_path / "s.safetensors"
    others = batches(6, width=160, seed=9)
    for data, options in ((others, {}), (DATA, {"seed": 5})):
        with pytest.raises(KeyboardInterrupt):
            lowbit.calibrate(model, dying(DATA, 3), path=path, snapshot_every=0.0)
        caplog.clear()

        found = lowbit.calibrate(model, data, path=path, snapshot_every=0.0, **options)

        assert same(found, lowbit.calibrate(model, data, **options))
        assert "starting afresh" in caplog.text


def test_a_quantized_model_can_be_calibrated(model, tmp_path):
    """Its weights are told from others' without being dequantized, and its inputs are taken like any other's."""
    lowbit.quantize_(model, "int8")
    path = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(DATA, 3), path=path, snapshot_every=0.0)

    assert same(lowbit.calibrate(model, DATA, path=path), lowbit.calibrate(model, DATA))


def test_a_damaged_snapshot_is_not_used(model, tmp_path, caplog):
    """A cut snapshot is passed over with a warning."""
    path = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(DATA, 3), path=path, snapshot_every=0.0)
    left = tmp_path / "s.safetensors.progress"
    left.write_bytes(left.read_bytes()[:-100])

    found = lowbit.calibrate(model, DATA, path=path)

    assert same(found, lowbit.calibrate(model, DATA))
    assert "starting afresh" in caplog.text


def test_an_iterator_cannot_be_run_twice(model, tmp_path):
    """A generator does for one pass; where a second is needed the error says what to do, and nothing is left."""
    path = tmp_path / "s.safetensors"

    assert same(lowbit.calibrate(model, iter(DATA), path=path), lowbit.calibrate(model, DATA))
    path.unlink()
    with pytest.raises(StatisticsError, match="pass a list or another re-iterable"):
        lowbit.calibrate(model, iter(DATA), path=path, memory=ONE)
    assert not path.exists()


def test_batches_that_change_between_passes_are_noticed(model, tmp_path):
    """Fewer batches, or batches with fewer tokens, in a later pass are an error."""

    class Changing:
        def __init__(self, later):
            self.later, self.passes = later, 0

        def __iter__(self):
            self.passes += 1
            return iter(DATA if self.passes == 1 else self.later)

    for later in (DATA[:-1], [x[:, :-1] for x in DATA]):
        with pytest.raises(StatisticsError, match="the same batches every time"):
            lowbit.calibrate(model, Changing(later), path=tmp_path / "s.safetensors", memory=ONE, resume=False)


def test_without_a_file_memory_is_a_bound(model):
    """In memory there is one pass: what does not fit is an error that names the remedy."""
    with pytest.raises(StatisticsError, match="give a path"):
        lowbit.calibrate(model, DATA, memory=ONE)


def test_an_error_leaves_the_old_file(tmp_path):
    """A run that fails leaves the target as it was, and no other file."""
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"old")

    with pytest.raises(StatisticsError, match="NaN"):
        lowbit.calibrate(Attention(), [*batches(2), torch.full((2, 3, 24), torch.nan)], path=path)

    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
