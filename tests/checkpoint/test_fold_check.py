"""Statistics of a model before or after scales were folded in, for a checkpoint of the other kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration import StatisticsFile, calibrate
from lowbit.calibration.names import layer_shapes
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.fold_check import check_norms
from lowbit.checkpoint.fold_data import Fold
from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.cli.known import statistics_of
from lowbit.errors import PlanError, StatisticsError
from lowbit.smoothing import find_groups
from lowbit.solvers import Statistics, awq
from tests.support.tiny_decoders import decoder, seen, tokens, written

pytest.importorskip("transformers")
TYPES = ("llama", "gemma")


def calibrated(model, path):
    """Statistics of a model's projections, also as a file: a head that is tied to the table has no weight in files."""
    return calibrate(model, [{"input_ids": batch} for batch in tokens(64).split(8)], layers=["_proj$"], path=path)


@pytest.fixture(scope="module", params=TYPES)
def both(request, tmp_path_factory):
    """A folder: a bfloat16 model, its quantized and its plain copy with folded scales, statistics of the plain ones."""
    root, model = tmp_path_factory.mktemp(request.param), decoder(request.param, layers=1).bfloat16()
    folder, known = written(model, root / "plain"), calibrated(model, root / "plain.stats")
    with pytest.MonkeyPatch.context() as patch, open_source(folder) as source:
        patch.setattr(awq, "EXPONENTS", (0.0, 0.3))
        plan = make_plan(source, "int8", preset="none", only=["_proj$"], statistics=known, solver="rtn")
        convert(source, root / "quantized", plan_folds(source, plan, known), statistics=known)
    with open_source(root / "quantized") as source:
        dequantize(source, root / "folded")
    again = decoder(request.param, layers=1).bfloat16()
    load(again, root / "folded", strict=False)
    calibrated(again, root / "folded.stats")
    return root


@pytest.mark.parametrize("checkpoint", ["plain", "folded", "quantized"])
def test_statistics_of_the_checkpoint_itself_are_taken(both, checkpoint, caplog):
    """In bfloat16, with uneven norms, neither error nor warning; a quantized layer has the shape that it decodes to."""
    stats = both / ("plain.stats" if checkpoint == "plain" else "folded.stats")
    with open_source(both / checkpoint) as source, statistics_of(source, stats) as known:
        assert set(known.layers) <= set(layer_shapes(source))
    assert not caplog.records


@pytest.mark.parametrize("checkpoint", ["folded", "quantized"])
def test_a_folded_checkpoint_refuses_statistics_of_the_one_before(both, checkpoint):
    """The header says that scales were folded in: the error names both files, a norm and what to do."""
    words = r"plain\.stats: are of the model before scales.*'model\.layers\.0\.\w+norm'.*calibrate this checkpoint"
    with (
        open_source(both / checkpoint) as source,
        pytest.raises(StatisticsError, match=words),
        statistics_of(source, both / "plain.stats"),
    ):
        pass


def test_a_plain_checkpoint_refuses_statistics_of_the_folded_one(both, tmp_path):
    """Where no header tells, such as of the checkpoint before or a single file, they are refused as the others are."""
    single = tmp_path / "alone.safetensors"
    save_file(load_file(both / "plain" / "model.safetensors"), single)
    for place in (both / "plain", single):
        with (
            open_source(place) as source,
            pytest.raises(StatisticsError, match=r"folded\.stats: are not of .* calibrate this one"),
            statistics_of(source, both / "folded.stats"),
        ):
            pass


@pytest.mark.parametrize(("checkpoint", "other"), [("plain", "folded.stats"), ("folded", "plain.stats")])
def test_converting_in_python_refuses_them_too(both, tmp_path, checkpoint, other):
    """`convert` itself looks at the norms, with and without scales to fold in, and writes nothing."""
    with open_source(both / checkpoint) as source, StatisticsFile(both / other) as known:
        plan = make_plan(source, "int8", preset="none", only=["_proj$"], statistics=known, solver="rtn")
        fold = Fold("model.layers.0.input_layernorm", (), "weight")
        groups = find_groups({key: info.shape for key, info in source.tensors.items()})
        group = next(group for group in groups if group.before == fold.before)
        kind = "1 + weight" if both.name.startswith("gemma") else "weight"
        fold = dataclasses.replace(fold, linears=group.linears, kind=kind, exponent=0.3)
        part = dataclasses.replace(plan.components[0], folds=(fold,))
        for each in (plan, dataclasses.replace(plan, components=(part,))):
            with pytest.raises(StatisticsError, match=rf"{other}: are "):
                convert(source, tmp_path / "out", each, statistics=known)
    assert list(tmp_path.iterdir()) == []


def test_a_fold_into_a_norm_of_the_other_kind_is_refused(tmp_path):
    """Without a config a plan may take Gemma's norms for Llama's: the statistics say what they multiply by."""
    folder = written(model := decoder("gemma", layers=1), tmp_path / "model")
    (folder / "config.json").unlink()
    known = seen(model)
    with open_source(folder / "model.safetensors") as source:
        plan = make_plan(source, "int8", preset="none", only=["_proj$"], statistics=known, solver="rtn")
        found = plan_folds(source, plan, known).components[0]
        index = next(i for i, fold in enumerate(found.folds) if fold.before.endswith("input_layernorm"))
        fold = dataclasses.replace(found.folds[index], exponent=0.3)
        edited = dataclasses.replace(plan, components=(dataclasses.replace(found, folds=(fold,)),))
        with pytest.raises(PlanError, match=r"'model\.layers\.0\.input_layernorm': by the statistics it does not"):
            convert(source, tmp_path / "out.safetensors", edited, statistics=known)
    assert fold.kind == "weight"
    assert not list(tmp_path.glob("out*"))


def test_without_rows_the_mean_of_all_counts(both):
    """Importance matrices keep no rows: their mean of the square alone refuses them, and those that fit are taken."""
    name = "model.layers.0.self_attn.q_proj"
    with open_source(both / "folded") as source:
        gain = source.read("", "model.layers.0.input_layernorm.weight").float() + (both.name.startswith("gemma"))
        for factor, fits in ((1.0, True), (1.1, False)):
            known = InMemory({name: Statistics(hessian=factor * gain.square(), tokens=99)})
            if fits:
                check_norms(source, known, "i.stats")
                continue
            with pytest.raises(StatisticsError, match=r"i\.stats: .*mean square of up to 1\.1"):
                check_norms(source, known, "i.stats")


def test_models_of_which_nothing_is_known_are_not_judged(tmp_path, caplog):
    """A model type whose norms are not known is passed over, whatever its statistics are."""
    model = decoder("cohere", layers=1)
    known = {f"model.layers.0.self_attn.{x}_proj": Statistics(hessian=torch.full((64,), 9e9), tokens=9) for x in "qkv"}
    with open_source(written(model, tmp_path / "model")) as source:
        check_norms(source, InMemory(known), "i.stats")
    assert not caplog.records
