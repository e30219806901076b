"""What a solver is: from a weight, a format and what is known about the layer's input, the parts to store.

All solvers minimize the error of the layer's output, `tr(E H E^T)` with `E` the error of the weight and `H = E[x x^T]`
the second moment of the input; without statistics `H` is the identity, and that is the squared error of the weight.
Where the second moment G of the gradient at the output is known, it is the error of the model's output,
`tr(G E H E^T)`: which outputs matter, and which of them make up for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.block_diagonal import count_of, shape_of


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one layer's input x [tokens, K]. Every field may be missing (None or 0).

    `hessian`: E[x x^T] over the first half of the samples as float32 [K, K], or only its diagonal as [K]; `tokens`: how
    many rows it was taken from. `held_out`, `held_out_tokens`: the same of the other half, on which results are judged.
    By channel over all samples, float32 [K]: `absmax`, `mean`, `minimum`, `maximum`. `samples`: some rows of x itself,
    [S, K]. `magnitudes`: int64 [4096], how many |x| there were by the upper 12 of their 31 float32 bits. `broad`: the
    samples are of as many kinds as what the model will meet, so what they lack will be lacking there.

    `output_hessian`, `output_held_out`: E[g g^T] of the gradient g at the layer's output, float32 [N, N], over samples
    of the two halves; or of these only equal blocks along the diagonal, [B, N/B, N/B], B a power of two.
    """

    hessian: Tensor | None = None
    tokens: int = 0
    held_out: Tensor | None = None
    held_out_tokens: int = 0
    absmax: Tensor | None = None
    mean: Tensor | None = None
    minimum: Tensor | None = None
    maximum: Tensor | None = None
    samples: Tensor | None = None
    magnitudes: Tensor | None = None
    broad: bool = False
    output_hessian: Tensor | None = None
    output_held_out: Tensor | None = None

    @property
    def total_tokens(self) -> int:
        """Rows of both halves."""
        return self.tokens + self.held_out_tokens

    @property
    def share(self) -> float:
        """Of all rows those in the first half."""
        return self.tokens / max(self.total_tokens, 1)

    @property
    def combined(self) -> Tensor | None:
        """E[x x^T] over all samples: the mean of both halves, each by its tokens; [K, K] or [K]."""
        if self.hessian is None or self.held_out is None or not self.held_out_tokens:
            return self.hessian
        return torch.lerp(self.held_out, self.hessian, self.share)

    @property
    def combined_output(self) -> Tensor | None:
        """E[g g^T] over all samples, [N, N] or its blocks: the mean of both halves; None without gradients."""
        if self.output_hessian is None or self.output_held_out is None:
            return self.output_hessian
        return torch.lerp(self.output_held_out, self.output_hessian, 0.5)

    @property
    def sure_mean(self) -> Tensor | None:
        """E[x] [K], without what may be noise: of few tokens every channel has a mean, and correcting it costs output.

        With a variance of v / T the best multiple of a mean m is 1 - v / T / m^2 (James and Stein).
        """
        moments = self.diagonal
        if self.mean is None or moments is None or not self.total_tokens:
            return self.mean
        squares = self.mean.square()
        noise = (moments / squares - 1).clamp_min_(0.0) / self.total_tokens
        # Squares that float32 has no number for are zero beside means that are not.
        return torch.where(squares == 0, 0.0, self.mean * (1 - noise).clamp_min_(0.0))

    @property
    def without_outputs(self) -> Statistics:
        """The same without what is known of the gradient: for several layers that have this input."""
        return replace(self, output_hessian=None, output_held_out=None)

    @property
    def of_channels(self) -> Statistics:
        """The same with the diagonals of the second moments of the input alone."""
        held = self.held_out if self.held_out is None or self.held_out.dim() == 1 else self.held_out.diagonal()
        return replace(self, hessian=self.diagonal, held_out=held)

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

    def check(self, n: int, k: int, where: str = "weight") -> None:
        """Raise `SolverError`, naming `where`, unless all that is known is of a layer [N, K], and finite."""
        self.column_weights(k, where)
        moments = (k,) if self.hessian is None or self.hessian.dim() == 1 else (k, k)
        shapes: dict[str, tuple[int, ...]] = {"hessian": moments, "held_out": moments}
        shapes |= dict.fromkeys(_BY_CHANNEL, (k,))
        try:
            outputs = shape_of(n, 1 if self.output_hessian is None else count_of(self.output_hessian))
        except ValueError as error:
            raise SolverError(f"{where}: the statistics hold an output_hessian of {error}") from None
        shapes |= dict.fromkeys(_BY_OUTPUT, outputs)
        if self.samples is not None and self.samples.numel():
            shapes["samples"] = (len(self.samples), k)
        for name, shape in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                found = f"{name} of shape {list(tensor.shape)}, expected {list(shape)}"
                raise SolverError(f"{where}: the statistics hold a {found}; they are those of another layer")
            low, high = torch.aminmax(tensor)
            if not bool(low.isfinite() & high.isfinite()):
                raise SolverError(f"{where}: the statistics hold a {name} with NaN or infinity; calibrate again")

    def on(self, device: torch.device) -> Statistics:
        """The same on a device, in float32."""
        names = ("hessian", "held_out", "samples", *_BY_CHANNEL, *_BY_OUTPUT)
        known = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.to(device, torch.float32) for name, tensor in known.items()})


_BY_CHANNEL = ("absmax", "mean", "minimum", "maximum")
_BY_OUTPUT = ("output_hessian", "output_held_out")


@dataclass(frozen=True)
class Option:
    """A number that a solver takes: an int or a float above or at `least`, at most `most`; finite."""

    kind: type[int] | type[float]
    least: float = 0.0
    most: float = float("inf")
    above: bool = False

    def read(self, text: str, what: str) -> float:
        """The value that a text gives. Raises `SolverError`, beginning with `what`, for another."""
        try:
            value = self.kind(text)
        except ValueError:
            value = self.kind(self.least) if self.above else -1
        low = value > self.least if self.above else value >= self.least
        if low and value <= self.most and (isinstance(value, int) or math.isfinite(value)):  # ints have no end
            return value
        noun = "a whole number" if self.kind is int else "a number"
        most = f" and at most {self.most:g}" if math.isfinite(self.most) else ""
        raise SolverError(
            f"{what} is {text!r}, expected {noun} {'above' if self.above else 'of at least'} {self.least:g}{most}"
        )


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
_OPTIONS: dict[str, dict[str, Option]] = {}
S = TypeVar("S", bound=Callable[..., Parts])


def register_solver(name: str, **options: Option) -> Callable[[S], S]:
    """Function decorator: make a solver known by its name. A second one of that name is refused.

    `options`: keyword arguments that the function takes besides those of `Solver`, each with a default. A pipeline
    gives them as `name(option=value,...)`.
    """

    def add(function: S) -> S:
        if name in _REGISTRY:
            raise SolverError(f"a solver named {name!r} is registered already")
        _REGISTRY[name], _OPTIONS[name] = function, options
        return function

    return add


def solvers() -> dict[str, Solver]:
    """Every registered solver by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def solver(name: str) -> Solver:
    """The solver of that name, with the options behind it, as in `learned_rounding(top_p=0.1)`.

    Raises `SolverError`, listing what is known, for an unknown solver or option, and for a value that it cannot have.
    """
    bare, _, given = name.partition("(")
    if bare not in _REGISTRY:
        raise SolverError(f"unknown solver {bare!r}; known solvers: {', '.join(sorted(_REGISTRY))}")
    found = _REGISTRY[bare]
    return partial(found, **_read_options(name, bare, given)) if given else found


def _read_options(name: str, bare: str, given: str) -> dict[str, Any]:
    """The values of what stands behind the parenthesis of a solver's name."""
    known = _OPTIONS.get(bare, {})
    if not given.endswith(")"):
        raise SolverError(f"{name!r}: a parenthesis is not closed; write it like learned_rounding(top_p=0.1,max_k=512)")
    read: dict[str, Any] = {}
    for item in given[:-1].split(","):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key in read:
            raise SolverError(f"{name!r}: write each option once, as option=value, instead of {item.strip()!r}")
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SolverError(f"{name!r}: {bare} has no option {key!r}; {has}")
        read[key] = known[key].read(value, f"{name!r}: {key}")
    return read
