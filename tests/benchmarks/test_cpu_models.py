"""The benchmark's decoder: it decodes what it would read at once, and its variants hold the same values."""

import pytest
import torch

from benchmarks import cpu_models
from benchmarks.cpu_linears import W4A8, WrongResultError


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """A small decoder."""
    for name, value in {"HIDDEN": 128, "INTERMEDIATE": 192, "HEADS": 4, "KV_HEADS": 2, "BUDGET": 0.0}.items():
        monkeypatch.setattr(cpu_models, name, value)


@torch.inference_mode()
def test_a_token_after_the_prompt_is_as_if_all_were_read_at_once():
    """The cache, the positions and the mask agree: the last logits are the same either way, and depend on the past."""
    ids = torch.randint(cpu_models.VOCABULARY, (1, cpu_models.PROMPT + 1))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % cpu_models.VOCABULARY

    def model():
        weights = cpu_models.Weights("float32", torch.float32)
        return cpu_models.Decoder(weights, cpu_models.PROMPT + 8, torch.float32)

    stepwise = cpu_models._last_logits(model(), ids)

    torch.testing.assert_close(stepwise, model()(ids, 0)[:, -1:].double(), rtol=1e-4, atol=1e-4)
    assert (cpu_models._last_logits(model(), other) - stepwise).abs().max() > 1e-4


@torch.inference_mode()
def test_every_variant_gives_the_same_logits():
    """Within their limits: bfloat16, 4-bit weights, and 4-bit weights with int8 activations; ratios are to bfloat16."""
    rows = {row["name"]: row for row in cpu_models.decoder(1)["rows"]}

    assert set(rows) == set(cpu_models.DECODER_ERROR) == {"bfloat16", "awq_w4a16", W4A8}
    assert all(0 < row["error"] <= cpu_models.DECODER_ERROR[name] for name, row in rows.items())
    assert [list(row["ratios"]) for row in rows.values()] == [[], ["bfloat16"], ["bfloat16"]]


@torch.inference_mode()
def test_a_decoder_that_computes_something_else_is_not_timed(monkeypatch):
    """Logits beyond the limit end the run before any clock does."""
    monkeypatch.setattr(cpu_models, "DECODER_ERROR", {"bfloat16": 1e-9})
    monkeypatch.setattr(cpu_models, "alternate", pytest.fail)

    with pytest.raises(WrongResultError, match="bfloat16: its result is off"):
        cpu_models.decoder(1)
