"""What a conversion does to a model as a whole: its outputs beside the reference's, and where along it errors arise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TIMES = (0.1, 0.5, 0.9)  # of a diffusion process, at which one-step errors are told
_NEAR = 0.1 + 1e-6  # how far a timestep may lie from one of them


@dataclass(frozen=True)
class BlockError:
    """Relative squared error of a block's output: |found - reference|^2 / |reference|^2.

    `accumulated`: with all layers of the model quantized; `isolated`: this block's alone, on the reference's inputs.
    """

    name: str
    accumulated: float
    isolated: float


@dataclass(frozen=True)
class EndToEnd:
    """A model's outputs beside the reference's.

    `kind`: "embeddings", "language" or "prediction". `measures` by name; the first one is what candidates are ranked
    by, and less is better. `samples`: embeddings, tokens or inputs compared. `blocks`: in the order of the model.
    """

    kind: str
    measures: Mapping[str, float]
    samples: int
    blocks: Sequence[BlockError] = ()

    @property
    def error(self) -> tuple[str, float]:
        """Name and value of the measure that candidates are ranked by."""
        return next(iter(self.measures.items()))

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        blocks = [vars(block) for block in self.blocks]
        return {"kind": self.kind, "measures": dict(self.measures), "samples": self.samples, "blocks": blocks}


class EmbeddingMeter:
    """Adds up embeddings [rows, features] beside their reference."""

    kind = "embeddings"

    def __init__(self) -> None:
        self._gaps: list[Tensor] = []

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Add some rows."""
        a, b = F.normalize(reference.double(), dim=1), F.normalize(found.double(), dim=1)
        # |a - b|^2 / 2 of unit vectors is 1 - cosine, without the cancellation
        self._gaps.append((a - b).square().sum(dim=1) / 2)

    def result(self) -> tuple[dict[str, float], int]:
        """The mean and the largest 1 - cosine, and the number of rows."""
        gaps = torch.cat(self._gaps)
        return {"mean 1 - cosine": float(gaps.mean()), "max 1 - cosine": float(gaps.max())}, len(gaps)


class LanguageMeter:
    """Adds up next-token predictions as logits [tokens, vocabulary]."""

    kind = "language"

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []
        self._same = 0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Add some tokens."""
        p, q = (F.log_softmax(x.float(), dim=-1) for x in (reference, found))
        self._same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        self._divergences.append(F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).double())

    def result(self) -> tuple[dict[str, float], int]:
        """KL(reference || found) in nats, its mean and 99th percentile, and the share of tokens with the same top-1."""
        each = torch.cat(self._divergences)
        found = {"mean KL": float(each.mean()), "q99 KL": float(each.quantile(0.99))}
        return {**found, "top-1 agreement": self._same / len(each)}, len(each)


class PredictionMeter:
    """Adds up outputs of any shape, such as the one-step predictions of a diffusion model."""

    kind = "prediction"

    def __init__(self) -> None:
        self._all = _Ratio()
        self._near = {time: _Ratio() for time in TIMES}
        self._count = 0

    def add(self, reference: Tensor, found: Tensor, times: Tensor | None = None) -> None:
        """Add the outputs of a batch; `times` ([B], in [0, 1]) are those of its rows."""
        self._all.add(reference, found)
        if times is None or not reference.dim() or len(times) != reference.shape[0]:
            self._count += 1
            return
        self._count += len(times)
        for time, ratio in self._near.items():
            chosen = (times - time).abs() <= _NEAR
            if bool(chosen.any()):
                ratio.add(reference[chosen], found[chosen])

    def result(self) -> tuple[dict[str, float], int]:
        """|found - reference| / |reference|, over all and at each of TIMES that there are inputs for."""
        found = {"relative error": self._all.length}
        found |= {f"at t = {time:g}": ratio.length for time, ratio in self._near.items() if ratio.used}
        return found, self._count


class _Ratio:
    """|found - reference|^2 over |reference|^2, summed in float64."""

    def __init__(self) -> None:
        self._noise = self._signal = 0.0
        self.used = False

    def add(self, reference: Tensor, found: Tensor) -> None:
        reference, found = reference.float(), found.float()
        self._noise += float((found - reference).square().sum(dtype=torch.float64))
        self._signal += float(reference.square().sum(dtype=torch.float64))
        self.used = True

    @property
    def squared(self) -> float:
        """The ratio; infinite for noise without signal, 0 without either."""
        if self._signal:
            return self._noise / self._signal
        return math.inf if self._noise else 0.0

    @property
    def length(self) -> float:
        """Its root."""
        return math.sqrt(self.squared) if not math.isnan(self.squared) else math.nan


class BlockMeter:
    """Adds up the output of one block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._accumulated, self._isolated = _Ratio(), _Ratio()

    def add(self, reference: Tensor, found: Tensor, *, isolated: bool) -> None:
        """Add the outputs of a batch."""
        (self._isolated if isolated else self._accumulated).add(reference, found)

    @property
    def used(self) -> bool:
        """Whether the block has run."""
        return self._accumulated.used

    def result(self) -> BlockError:
        """The errors over all batches."""
        return BlockError(self.name, self._accumulated.squared, self._isolated.squared)


def psnr(reference: Tensor, found: Tensor, data_range: float) -> float:
    """10 log10(range^2 / mean squared difference) in dB; infinite for equal images."""
    error = float((reference.double() - found.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)
