"""Every model type whose norms are known: a scale folded into any of its groups leaves what it computes unchanged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.folding import folded
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import PlanError
from lowbit.smoothing import NORMS
from lowbit.solvers import awq
from tests.support.tiny_decoders import decoder, distance, logits, seen, written

pytest.importorskip("transformers")
SPEC = "awq_w4a16(group_size=32)"
NORMS_AND_LINEARS = {"exaone4": 2, "olmo2": 2}  # groups in a block, where those of norms that come after are missing
MORE = {"llama": {"attention_bias": True, "mlp_bias": True}}


@pytest.fixture(autouse=True)
def few_exponents(monkeypatch):
    """Which scale is best does not matter here."""
    monkeypatch.setattr(awq, "EXPONENTS", (0.0, 0.3))


def folded_everywhere(plan):
    """The plan with a large scale in every group that can take one, whether that gains or not."""
    parts = [
        dataclasses.replace(
            part,
            folds=tuple(dataclasses.replace(fold, exponent=0.6 if fold.error_before else 0.0) for fold in part.folds),
        )
        for part in plan.components
    ]
    return dataclasses.replace(plan, components=tuple(parts))


@pytest.mark.parametrize("model_type", NORMS)
def test_what_a_model_computes_is_unchanged(tmp_path, model_type):
    """With scales of up to many times one in all groups the logits are the same but for float32's rounding."""
    model = decoder(model_type, layers=1, **MORE.get(model_type, {}))
    before, known = logits(model), seen(model)
    with open_source(written(model, tmp_path / "model")) as source:
        plan = plan_folds(source, make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known), known)
        folds = plan.components[0].folds
        view, _ = folded(source, folded_everywhere(plan), known)
        changed = {key: view.read("", key) for key in source.tensors}

    assert len([fold for fold in folds if fold.error_before]) == NORMS_AND_LINEARS.get(model_type, 4), folds
    far = [distance(changed[key], value) for key, value in model.state_dict().items() if "layernorm" in key]
    model.load_state_dict(changed, strict=False)
    assert max(distance(value, model.state_dict()[key]) for key, value in changed.items()) == 0
    assert distance(logits(model), before) < 2e-5
    assert max(far) > 0.2 or model_type in NORMS_AND_LINEARS


def test_another_model_type_is_refused(tmp_path):
    """A model type whose norms are not known is an error that names it and the known ones; nothing is guessed."""
    model = decoder("cohere", layers=1)
    with open_source(written(model, tmp_path / "model")) as source:
        known = seen(model)
        plan = make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known)
        with pytest.raises(PlanError, match=r"model type 'cohere' multiply by is not known \(exaone4, gemma.*llama"):
            plan_folds(source, plan, known)


@pytest.mark.parametrize(("model_type", "complaint"), [("gemma", "its weight"), ("llama", "1 + its weight")])
def test_statistics_contradict_a_wrong_model_type(tmp_path, monkeypatch, model_type, complaint):
    """A norm that gives what its weight, taken the other way, cannot give is left alone, whatever the table says."""
    model = decoder(model_type, layers=1)
    monkeypatch.setitem(NORMS, model_type, {"gemma": "weight", "llama": "1 + weight"}[model_type])
    with open_source(written(model, tmp_path / "model")) as source:
        known = seen(model)
        plan = plan_folds(source, make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known), known)
    norms = [fold for fold in plan.components[0].folds if "norm" in fold.before]

    assert len(norms) == 2
    for fold in norms:
        assert not fold.active
        assert fold.why == f"by the statistics it does not multiply by {complaint}"


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_a_file_without_a_config_is_folded_by_names_when_the_statistics_agree(tmp_path, model_type):
    """By names alone a norm is taken to multiply by its weight: right for Llama, and for Gemma found to be wrong."""
    model = decoder(model_type, layers=1)
    folder = written(model, tmp_path / "model")
    (folder / "config.json").unlink()
    with open_source(folder / "model.safetensors") as source:
        known = seen(model)
        plan = plan_folds(source, make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known), known)
    active = {fold.before.rpartition(".")[2] for fold in plan.components[0].folds if fold.active}

    norms = {"input_layernorm", "post_attention_layernorm"}
    assert norms & active == (norms if model_type == "llama" else set())


def test_bfloat16_and_gemma_norms_hold_their_scales_exactly(tmp_path):
    """In bfloat16 every norm after folding is its old factor times the scale to float32's precision."""
    for model_type in ("gemma", "llama"):
        model = decoder(model_type, layers=1).bfloat16()
        known = seen(model.float())
        model.bfloat16()
        with open_source(written(model, tmp_path / model_type)) as source:
            plan = make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known)
            view, scaled = folded(source, folded_everywhere(plan_folds(source, plan, known)), known)
            offset = 1.0 if model_type == "gemma" else 0.0
            key, linear = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
            old, new = (x.read("", key).float() + offset for x in (source, view))
            scale = (scaled.get(linear).diagonal / known.get(linear).diagonal).sqrt()
        assert not torch.equal(old, new)
        torch.testing.assert_close(new / old, scale, rtol=2e-6, atol=0)
