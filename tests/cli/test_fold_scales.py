"""The option --fold-scales of convert and plan: what it prints, what it writes, and what it cannot do."""

from __future__ import annotations

import json

import pytest

from lowbit.calibration import save_statistics
from lowbit.solvers import awq
from tests.support.tiny_decoders import decoder, seen, written

pytest.importorskip("transformers")
GROUPS = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
WISHES = ("--format", "awq_w4a16(group_size=32)", "--only", "_proj$", "--preset", "none", "--fold-scales")


@pytest.fixture(autouse=True)
def few_exponents(monkeypatch):
    """Which scale is best does not matter here."""
    monkeypatch.setattr(awq, "EXPONENTS", (0.0, 0.3))


@pytest.fixture
def llama(tmp_path):
    """A model folder and a statistics file."""
    model = decoder("llama", layers=1)
    save_statistics(seen(model), tmp_path / "stats.safetensors")
    return written(model, tmp_path / "model"), tmp_path / "stats.safetensors"


def test_a_plan_lists_the_groups_and_what_each_gains(lowbit, llama, tmp_path):
    """Nothing is written but the plan; it and the JSON have each group with its errors, and converting takes it."""
    folder, stats = llama
    found = lowbit("plan", folder, *WISHES, "--stats", stats, "-o", tmp_path / "plan.json", "--json")
    folds = found.json["components"][""]["folds"]

    assert found.code == 0
    assert [fold["before"] for fold in folds] == [f"model.layers.0.{name}" for name in GROUPS]
    for fold in (folds[0], folds[2]):
        assert fold["exponent"] == 0.3
        assert 0 < fold["error_after"] < 0.9 * fold["error_before"]
    assert json.loads((tmp_path / "plan.json").read_text())["components"][""]["folds"] == folds
    done = lowbit(
        "convert", folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--stats", stats, "--json"
    )
    assert done.code == 0
    assert found.json["warnings"] == done.json["warnings"] == []
    assert [{key: fold[key] for key in fold if key != "component"} for fold in done.json["folds"]] == folds
    assert lowbit("verify", folder, tmp_path / "out", "--min-sqnr", "12").code == 0


def test_converting_shows_the_gain_and_corrects_what_is_left(lowbit, llama, tmp_path):
    """The table names the norms with their error before and after; an error LoRA is that of the folded model."""
    folder, stats = llama
    lora = ("--error-lora", tmp_path / "lora.safetensors", "--lora-rank", "16", "--lora-prefix", "base_model.model.")
    found = lowbit("convert", folder, "-o", tmp_path / "out", *WISHES, "--stats", stats, *lora)

    assert found.code == 0, found.err
    text = found.out + found.err
    assert "output error held out" in text
    assert "model.layers.0.input_layernorm" in text
    assert "of 4 norms and linears" in text
    left = int(text.split(" % of their squared error")[0].rpartition(" ")[2])
    assert left < 90


def test_what_cannot_be_done_is_said_first(lowbit, llama, tmp_path):
    """Without statistics, and beside a plan file: one sentence, and nothing is written."""
    folder, _ = llama
    out = tmp_path / "out"
    for arguments, complaint in [
        ((folder, *WISHES), "there are no statistics; calibrate"),
        ((folder, "--plan", tmp_path / "p.json", "--fold-scales"), "--fold-scales: the plan file says this already"),
    ]:
        found = lowbit("convert", *arguments, "-o", out)
        assert found.code != 0
        assert complaint in " ".join(found.err.split())
        assert not out.exists()
