"""What of a text model's output counts for gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowbit.calibration.batches import Batch
from lowbit.calibration.gradients import whole_output
from lowbit.errors import StatisticsError
from lowbit.integrations.text_models import TextModel
from lowbit.integrations.text_objectives import objective_of, text_objective

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
BATCH = Batch((), {"attention_mask": MASK}, 2, (MASK.bool(),))


def test_a_change_of_logits_costs_twice_the_divergence():
    """|d 2 sqrt(p)|^2 is 2 KL(p, q) for small changes, summed over the tokens that are no padding."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 50)
    changed = logits + 0.01 * torch.randn_like(logits)

    cost = (
        (text_objective(SimpleNamespace(logits=changed), BATCH) - text_objective(SimpleNamespace(logits=logits), BATCH))
        .square()
        .sum()
    )

    p, q = (F.log_softmax(x.double(), -1) for x in (logits, changed))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert float(cost) == pytest.approx(2 * float(divergence[MASK == 1].sum()), rel=0.03)


def test_a_change_of_hidden_states_costs_the_cosine():
    """The squared change of the embedding is 2 - 2 cosine; padding is not in it."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 16)
    changed = hidden + 0.1 * torch.randn_like(hidden)
    changed[0, 3] = 1e4

    cost = (
        (
            text_objective(SimpleNamespace(last_hidden_state=changed), BATCH)
            - text_objective(SimpleNamespace(last_hidden_state=hidden), BATCH)
        )
        .square()
        .sum(1)
    )

    means = [torch.stack([x[0, :3].mean(0), x[1].mean(0)]) for x in (hidden, changed)]
    torch.testing.assert_close(cost, 2 - 2 * F.cosine_similarity(*means), rtol=1e-3, atol=1e-6)


def test_other_outputs_are_one_error():
    """A model that returns neither logits nor hidden states is refused, with what to do."""
    with pytest.raises(StatisticsError, match="neither logits nor last_hidden_state; calibrate without gradients"):
        text_objective(SimpleNamespace(loss=torch.zeros(())), BATCH)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("BertModel", text_objective), ("T5EncoderModel", whole_output), ("CLIPTextModelWithProjection", whole_output)],
)
def test_encoders_of_diffusion_models_are_read_token_by_token(architecture, expected):
    """Of T5 and CLIP every token's hidden state counts, of sentence models the embedding."""
    model = type(architecture, (nn.Module,), {})()

    assert objective_of(TextModel(Path(), model, None, causal=False)) is expected
