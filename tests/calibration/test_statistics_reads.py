"""What is read of a statistics file by those who need but a part of it, and what its fingerprint covers."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.calibration import StatisticsFile, calibrate
from lowbit.calibration.collection import CHANNELS, INPUT_MOMENTS
from lowbit.calibration.stored import OUTPUT_FIELDS
from lowbit.checkpoint import convert_layer
from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.source import open_source
from lowbit.solvers import awq
from tests.calibration.models import Chain, batches
from tests.support.tiny_decoders import decoder, tokens, written

WIDTHS = (64, 96, 64)


@pytest.fixture
def taken():
    """Statistics with gradients, in memory."""
    torch.manual_seed(0)
    return lowbit.calibrate(Chain(WIDTHS), batches(width=64), gradients=True)


@pytest.fixture
def path(taken, tmp_path):
    """The same in a file."""
    return taken.save(tmp_path / "s.stats")


@pytest.fixture
def fields_read(monkeypatch):
    """The fields of statistics that are read from files from now on, in order."""
    names = []
    own = SafetensorsFile.read

    def noted(self, name):
        names.append(name.partition(".")[2])
        return own(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", noted)
    return names


def changed(path, target, field):
    """The file with one value on the diagonal of a field of every input or output changed, as `target`."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == field:
            tensor.view(-1)[-1] += 0.5
    with safe_open(path, "pt") as file:
        save_file(tensors, target, file.metadata())
    return target


def test_an_input_is_read_without_the_gradients(taken, path, fields_read):
    """`get_input` is what `get` gives but for the gradients, and these are not read."""
    with StatisticsFile(path) as file:
        found = file.get_input("steps.0")
        assert not set(fields_read) & set(OUTPUT_FIELDS)
        assert found.output_hessian is None
        assert torch.equal(found.hessian, taken["steps.0"].hessian)
        assert torch.equal(file["steps.0"].output_hessian, taken["steps.0"].output_hessian)
        assert file.get_input("unknown") is None
        assert file.judging_moments("unknown") is None


def test_comparing_reads_one_moment_of_each_layer(taken, path, tmp_path, fields_read):
    """Output errors take the half held out and nothing else of the file, and are those of whole statistics."""
    torch.manual_seed(0)
    save_file(Chain(WIDTHS).state_dict(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, "int8", preset="none"))
    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "out.safetensors") as out:
        fields_read.clear()
        with StatisticsFile(path) as file:
            found = compare(source, [out], statistics=file, rtn=False, histograms=0, jobs=1)
        of_statistics = [name for name in fields_read if name in (*OUTPUT_FIELDS, *INPUT_MOMENTS, *CHANNELS, "samples")]
        whole = compare(source, [out], statistics=dict(taken), rtn=False, histograms=0, jobs=1)

    assert of_statistics == ["held_out"] * 2
    assert "held_out.correlations" in fields_read
    assert "hessian.correlations" not in fields_read
    errors = [[layer.output_sqnr for layer in each.candidates[0].layers] for each in (found, whole)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 2


def test_choosing_scales_to_fold_reads_no_gradients(tmp_path, monkeypatch, fields_read):
    """`plan_folds`, and converting by rounding with what it chose, need only the inputs."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(awq, "EXPONENTS", (0.0, 0.3))
    model = decoder("llama", layers=1)
    data = [{"input_ids": batch} for batch in tokens(64).split(8)]
    calibrate(model, data, layers=["_proj$"], path=tmp_path / "s.stats", gradients=lambda out, _: out.logits.sum())
    with open_source(written(model, tmp_path / "model")) as source, StatisticsFile(tmp_path / "s.stats") as file:
        assert file.gradient_size("model.layers.0.self_attn.q_proj")
        plan = make_plan(source, "int8", preset="none", only=["_proj$"], statistics=file, solver="rtn")
        fields_read.clear()
        made = plan_folds(source, plan, file)

    assert any(fold.active for fold in made.components[0].folds)
    assert "hessian" in fields_read
    assert not set(fields_read) & set(OUTPUT_FIELDS)


# ---- the fingerprint ------------------------------------------------------------------------------------------------


def test_memory_and_file_have_one_fingerprint(taken, path, fields_read):
    """Saving does not change it, and of the file's matrices only the diagonals are read."""
    with StatisticsFile(path) as file:
        assert file.fingerprint() == taken.fingerprint()
    assert "hessian" in fields_read
    assert not any("correlations" in name or name == "samples" for name in fields_read)


@pytest.mark.parametrize("field", [*INPUT_MOMENTS, *CHANNELS, *OUTPUT_FIELDS])
def test_every_moment_and_range_counts(path, tmp_path, field):
    """Files that differ in one field alone, that of the gradients too, have other fingerprints."""
    other = changed(path, tmp_path / "other.stats", field)
    with StatisticsFile(path) as one, StatisticsFile(other) as two:
        assert one.fingerprint() != two.fingerprint()


def test_work_done_with_other_gradients_is_not_used(path, tmp_path, monkeypatch, caplog):
    """An interrupted conversion goes on with the same statistics, and starts afresh where only the gradients differ."""
    torch.manual_seed(0)
    save_file(Chain(WIDTHS).state_dict(), tmp_path / "in.safetensors")
    other = changed(path, tmp_path / "other.stats", "output_hessian")

    def run(statistics, target="out.safetensors"):
        with open_source(tmp_path / "in.safetensors") as source, StatisticsFile(statistics) as known:
            plan = make_plan(source, "awq_w4a16(group_size=32)", preset="none", statistics=known)
            return convert(source, tmp_path / target, plan, statistics=known, jobs=1)

    def interrupt():
        solve, calls = convert_layer.solve, []

        def stopped(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return solve(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(convert_layer, "solve", stopped)
            with pytest.raises(KeyboardInterrupt):
                run(path)

    interrupt()
    assert run(path).resumed == 1
    interrupt()
    with caplog.at_level(logging.WARNING):
        assert run(other).resumed == 0
    assert "starting afresh" in caplog.text
