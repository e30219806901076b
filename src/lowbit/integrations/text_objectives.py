"""What counts in the output of a text model, for gradients: its embedding, its tokens, or their distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowbit.calibration.batches import Batch
from lowbit.calibration.gradients import Objective, whole_output
from lowbit.errors import StatisticsError

from .text_models import TextModel

_EVERY_TOKEN = ("T5", "UMT5", "CLIPText")
"""Encoders whose hidden states are read token by token, by diffusion models."""


def objective_of(text_model: TextModel) -> Objective:
    """What counts of a model's output: every token's hidden state where those are read, else `text_objective`."""
    architecture = type(text_model.model).__name__
    return whole_output if architecture.startswith(_EVERY_TOKEN) and not text_model.causal else text_objective


def text_objective(output: Any, batch: Batch) -> Tensor:
    """Of logits 2 sqrt(softmax), whose squared change is twice the KL divergence; of hidden states the embedding.

    The embedding [B, features] is the mean over the tokens, of length 1: its squared change is 2 - 2 cosine. Tokens of
    padding do not count. Raises `StatisticsError` for a model that returns neither.
    """
    logits = getattr(output, "logits", None)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(logits, Tensor) and not isinstance(hidden, Tensor):
        raise StatisticsError(
            f"the model returned {type(output).__name__}, with neither logits nor last_hidden_state; calibrate without "
            "gradients"
        )
    if isinstance(logits, Tensor):
        roots = 2 * F.log_softmax(logits.float(), dim=-1).mul(0.5).exp()
        return roots * _weights(roots, batch) if roots.dim() == 3 else roots
    assert isinstance(hidden, Tensor)
    weights = _weights(hidden, batch)
    mean = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1.0)
    return F.normalize(mean, dim=1)


def _weights(x: Tensor, batch: Batch) -> Tensor:
    """1 for a token of x [B, T, ...] that counts, 0 for padding: float32 [B, T, 1]."""
    for mask in batch.masks:
        if mask.shape == x.shape[:2]:
            return mask.to(x.device).unsqueeze(-1).float()
    return x.new_ones((*x.shape[:2], 1)).float()
