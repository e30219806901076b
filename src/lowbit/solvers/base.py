"""What a solver is: from a weight, a format and what is known about the layer's input, the parts to store.

All solvers minimize the error of the layer's output, `tr(E H E^T)` with `E` the error of the weight and `H = E[x x^T]`
the second moment of the input; without statistics `H` is the identity, and that is the squared error of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one layer's input x [tokens, K]. Every field may be missing.

    `hessian`: E[x x^T] as [K, K], or only its diagonal as [K], float32. `absmax`, `mean`, `minimum`: by channel, [K]
    float32. `tokens`: how many rows they were taken from.
    """

    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean: Tensor | None = None
    minimum: Tensor | None = None
    tokens: int = 0

    @property
    def diagonal(self) -> Tensor | None:
        """E[x_k^2] of each channel as [K], or None."""
        if self.hessian is None:
            return None
        return self.hessian.diagonal() if self.hessian.dim() == 2 else self.hessian

    def column_weights(self, k: int, where: str = "weight") -> Tensor | None:
        """How much the error of each column counts, float32 [K], or None when all count the same.

        Raises `SolverError`, naming `where`, when the statistics are those of another layer or no second moments.
        """
        weights = self.diagonal
        if weights is None:
            return None
        if weights.shape != (k,):
            raise SolverError(f"{where}: the statistics are for K = {weights.shape[0]}, the weight has K = {k}")
        weights = weights.float()
        if not bool((weights >= 0).all() & weights.isfinite().all()):
            raise SolverError(f"{where}: the statistics hold negative or non-finite second moments; calibrate again")
        return weights


class Solver(Protocol):
    """A solver is a function with this signature, registered under a name."""

    def __call__(
        self,
        w: Tensor,
        fmt: Format,
        statistics: Statistics | None = None,
        *,
        where: str = "weight",
        seed: int | None = None,
    ) -> Parts:
        """The parts of a weight [N, K] (any float dtype).

        `where` names the layer in errors. With a `seed`, codes are rounded stochastically where the format can.
        Raises `WeightError` for a weight that cannot be stored, `SolverError` for missing or unusable statistics.
        """
        ...


_REGISTRY: dict[str, Solver] = {}
S = TypeVar("S", bound=Solver)


def register_solver(name: str) -> Callable[[S], S]:
    """Function decorator: make a solver known by its name. A second one of that name is refused."""

    def add(function: S) -> S:
        if name in _REGISTRY:
            raise SolverError(f"a solver named {name!r} is registered already")
        _REGISTRY[name] = function
        return function

    return add


def solvers() -> dict[str, Solver]:
    """Every registered solver by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def solver(name: str) -> Solver:
    """The solver of that name; `SolverError` lists the known ones."""
    if name not in _REGISTRY:
        raise SolverError(f"unknown solver {name!r}; known solvers: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]
