"""Gradients of layers too wide for the memory: blocks along the diagonal of the same matrices."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit.calibration import StatisticsFile, save_statistics
from lowbit.calibration.gradients import fitting
from lowbit.calibration.merge import Merged
from lowbit.errors import StatisticsError
from lowbit.numerics.block_diagonal import divided
from tests.calibration.models import Chain, batches, same
from tests.calibration.test_passes import dying

FEW = "20MB"  # room for blocks of 512 of the widest below
FIELDS = ("output_hessian", "output_held_out")


def wide() -> Chain:
    """Three linears, the first with 2048 outputs."""
    torch.manual_seed(3)
    return Chain((24, 2048, 24, 24))


def both(**how):
    """Statistics without a bound on memory and with one."""
    return [lowbit.calibrate(wide(), batches(6), gradients=True, memory=memory, **how) for memory in (None, FEW)]


def test_blocks_hold_what_the_whole_matrix_does():
    """With less memory the widest layer has blocks, equal to those of its matrix, and the others what they had."""
    whole, found = both()

    assert tuple(found["steps.0"].output_hessian.shape) == (4, 512, 512)
    for field in FIELDS:
        wanted = divided(getattr(whole["steps.0"], field), 4)
        torch.testing.assert_close(getattr(found["steps.0"], field), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(getattr(found["steps.1"], field), getattr(whole["steps.1"], field))
    sizes = [one.gradient_size("steps.0") for one in (whole, found)]
    assert sizes == [2048**2, 2048 * 512]


def test_one_pass_is_enough():
    """A generator does, and the model runs once for every batch."""
    model, calls = wide(), []
    model.register_forward_hook(lambda *_: calls.append(1))

    found = lowbit.calibrate(model, iter(batches(6)), gradients=True, memory=FEW)

    assert len(calls) == 6
    assert same(found, both()[1])


def test_files_hold_blocks(tmp_path):
    """Written by the run or later they are the same, with a quarter of the correlations."""
    taken = both()[1]
    written = lowbit.calibrate(wide(), batches(6), gradients=True, memory=FEW, path=tmp_path / "s.safetensors")

    assert same(written, taken)
    assert written.contents.layers["steps.0"].blocks == 4
    assert written.fingerprint() == taken.fingerprint()
    with StatisticsFile(save_statistics(taken, tmp_path / "again.safetensors")) as again:
        assert same(again, taken)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        key = f"{written.contents.layers['steps.0'].output}.output_hessian"
        assert file.get_slice(key).get_shape() == [2048]
        assert file.get_slice(f"{key}.correlations").get_shape()[0] < 2048 * 2048 / 7
        facts = json.loads(file.metadata()["lowbit.statistics"])
    assert [layer.get("blocks") for layer in facts["layers"].values()] == [4, None, None]


def test_merged_they_have_what_all_know():
    """The mean of whole matrices and of blocks has the blocks, in whichever order."""
    whole, found = both()

    for parts in ((whole, found), (found, whole)):
        merged = Merged(parts)
        assert merged.contents.layers["steps.0"].blocks == 4
        torch.testing.assert_close(
            merged["steps.0"].output_hessian, found["steps.0"].output_hessian, rtol=1e-4, atol=1e-5
        )
        assert merged["steps.1"].output_hessian.shape == (24, 24)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_run_goes_on_with_blocks(tmp_path, after):
    """The next run goes on at that batch, and the file is the same to the byte."""
    stopped, straight = tmp_path / "s.safetensors", tmp_path / "other.safetensors"
    how = {"gradients": True, "snapshot_every": 0, "memory": FEW}
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(wide(), dying(batches(6), after), path=stopped, **how)
    model, calls = wide(), []
    model.register_forward_hook(lambda *_: calls.append(1))

    lowbit.calibrate(model, batches(6), path=stopped, **how).close()

    assert len(calls) == 6 - after
    lowbit.calibrate(wide(), batches(6), path=straight, **how).close()
    assert stopped.read_bytes() == straight.read_bytes()


def test_a_run_interrupted_with_other_blocks_starts_afresh(tmp_path, monkeypatch, caplog):
    """Another version may divide otherwise: what it had so far is no use, and that is said."""
    path, how = tmp_path / "s.safetensors", {"gradients": True, "snapshot_every": 0, "memory": "auto"}
    with monkeypatch.context() as other:
        other.setattr("lowbit.calibration.collect.fitting", lambda linears, _: dict.fromkeys(linears, 2))
        with pytest.raises(KeyboardInterrupt):
            lowbit.calibrate(wide(), dying(batches(6), 3), path=path, **how)

    found = lowbit.calibrate(wide(), batches(6), path=path, **how)

    assert "starting afresh" in caplog.text
    assert same(found, both()[0])


def test_a_layer_solved_with_blocks_gains():
    """Weights solved with them lose less of the model's output than without."""
    data = batches(8, size=256, tokens=4)
    x = torch.randn(512, 24, generator=torch.Generator().manual_seed(5))
    errors = []
    for gradients in (True, False):
        known = lowbit.calibrate(wide(), data, gradients=gradients, memory="40MB")
        model = wide()
        lowbit.quantize_(model, {r"steps\.0": "wna16(bits=3)"}, statistics=known)
        with torch.inference_mode():
            errors.append(float((model(x) - wide()(x)).square().mean()))

    assert known.gradient_size("steps.0") == 0
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("blocks", [3, 4096, "two"])
def test_a_damaged_number_of_blocks_is_refused(tmp_path, blocks):
    """Blocks that do not divide the rows, or that are no number, are one error that names the file."""
    path = save_statistics(both()[1], tmp_path / "s.safetensors")
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lowbit.statistics"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    facts["layers"]["steps.0"]["blocks"] = blocks
    save_file(tensors, path, {"lowbit.statistics": json.dumps(facts)})

    with pytest.raises(StatisticsError, match=r"s\.safetensors: its header cannot be read"):
        StatisticsFile(path)


def linears(*widths: int) -> dict[str, torch.nn.Linear]:
    """Linears of so many outputs."""
    return {str(i): torch.nn.Linear(1, width, device="meta") for i, width in enumerate(widths)}


def test_the_widest_are_divided_first():
    """All fit whole, or the widest are halved until they do; where the smallest blocks do not fit, layers have none."""
    some = linears(4096, 11008, 4096, 192)
    gib = 2**30

    assert fitting(some, None) == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert fitting(some, 2 * gib) == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert fitting(some, gib) == {"0": 1, "1": 2, "2": 1, "3": 1}
    assert fitting(some, gib // 2) == {"0": 2, "1": 4, "2": 2, "3": 1}
    assert fitting(some, gib // 8) == {"0": 8, "1": 32, "2": 8, "3": 1}
    assert set(fitting(some, gib // 32)) == {"0", "2", "3"}
    assert fitting(some, 0) == {}


def test_odd_numbers_of_rows_stay_whole():
    """Rows that cannot be halved are one block, or none."""
    assert fitting(linears(1001, 4096), 2**26) == {"0": 1, "1": 4}


def test_who_has_no_room_leaves_it_to_the_others():
    """A layer that would not fit in the smallest blocks is left out before others are divided for it."""
    rest = linears(*[768] * 48, *[3072] * 12)
    head = linears(*[768] * 48, *[3072] * 12, 28_996)  # 4 blocks of 7249: more than all others together

    assert fitting(head, 2**30) == fitting(rest, 2**30)
