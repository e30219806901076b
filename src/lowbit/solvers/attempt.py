"""What a layer may become, and what is lost by it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.formats.parts import Parts

from .unseen import Trial


@dataclass(frozen=True)
class Attempt:
    """Parts that a pipeline `name` made, and the trial that went before it; None where only the start was run.

    `rows_coupled`: by G of both halves.
    """

    name: str
    parts: Parts
    trial: Trial | None = None
    bias: Tensor | None = None
    rows_coupled: bool = False


@dataclass(frozen=True)
class Lost:
    """What a layer loses of its `signal`, by the error of its weight and by rounding its input."""

    weight: float
    input: float
    signal: float

    @property
    def error(self) -> float:
        """As a share of the signal."""
        return ratio(self.weight + self.input, self.signal)


def ratio(lost: float, signal: float) -> float:
    """The share of a signal that is lost: of none, 1 for anything and 0 for nothing."""
    return lost / signal if signal else float(lost > 0)
