"""learned_rounding: rounding that lowers the error within the leading singular vectors of the weight.

    L = |U^T (decoded - W) V|        U [N, k], V [K, k]: the leading singular vectors of W, k by `projected_rank`

The objective of TPEC's and Clybius's tools, here for comparison and research. It knows nothing of the layer's input,
and for the output that is what counts: **it does not help**. Measured on a 512 x 512 weight with a few large columns
and an input with a power-law spectrum (error of the output on other samples, relative to the signal, in percent):

    solver                      fp8_e4m3      int8          awq_w4a16
    rtn                         2.66          2.86          14.91
    learned_rounding            2.80          2.87          15.42
    the iterative ones          2.80 to 6.90  2.86 to 2.94  14.91 to 15.11
    scale_search+gptq+descent   1.60          1.82          8.67

Where the iterative ones equal `rtn`, no code that they reached lowered L, in seconds against its milliseconds.

Without second moments of the input, rounding to nearest has the least error there is at given scales; this objective
sees only k^2 / NK of it and raises the rest. Use `scale_search` without calibration and gptq with it. `solve` takes
rounding to nearest instead of any of these where statistics show that they are worse.

Continuous codes that reach L = 0 need no iterations: with E the error of rounding to nearest, the smallest change of
the decoded weight that does it is -U U^T E V V^T. `learned_rounding` makes that change and rounds once more. The others
search for it step by step, with the exact gradient by the codes, dL/dq = dL/d(decoded) * scale:
`learned_rounding_original`, `_adamw`, `_radam` and `_prodigy` (see `learned_rounding_optimizers`).

Options are written behind the name, as in `learned_rounding(top_p=0.1,max_k=512)`: `top_p` (0.2), `min_k` (256) and
`max_k` (1280) of `projected_rank`; of the iterative ones also `iterations` (300 at most), and `lr` (0.05 codes an
iteration) of `_adamw` and `_radam`; the others find their step themselves.

What is compared is L after rounding, and the best is kept, plain rounding among them: none of these returns a larger L
than rounding to nearest. Everything is float32, and the same weight gives the same bits on the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.low_rank import leading_basis, orthonormal

from .base import Option, Statistics, register_solver
from .learned_rounding_optimizers import OPTIMIZERS, Optimizer

TOP_P, MIN_K, MAX_K = 0.2, 256, 1280
ITERATIONS = 300
PATIENCE = 40  # iterations that gain less than GAIN of the loss, rounded and not, before the search stops
GAIN = 1e-3
_PASSES = 4  # of the iteration that finds V


def projected_rank(n: int, k: int, top_p: float = TOP_P, min_k: int = MIN_K, max_k: int = MAX_K) -> int:
    """How many singular vectors the objective looks at: the share `top_p` of them, within [min_k, max_k] and all."""
    most = min(n, k)
    return min(most, max_k, max(min_k, int(top_p * most)))


class Projection:
    """The objective for one weight: U, V and what follows from them."""

    def __init__(self, w: Tensor, rank: int) -> None:
        size = w.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scaled = w / size  # so that squares fit into float32
        self.v = leading_basis(lambda: iter((scaled,)), w.shape[1], rank, _PASSES, w.device)[:, :rank]
        self.u = orthonormal(scaled @ self.v)

    def seen(self, error: Tensor) -> Tensor:
        """U^T E V [k, k] of an error [N, K]."""
        return self.u.t() @ error @ self.v

    def loss(self, error: Tensor) -> float:
        """|U^T E V|, the square root of the sum of squares."""
        return float(torch.linalg.vector_norm(self.seen(error), dtype=torch.float64))

    def back(self, seen: Tensor) -> Tensor:
        """U X V^T [N, K] of X [k, k]."""
        return self.u @ seen @ self.v.t()


class _Problem:
    """One weight in one format: what rounding to nearest gives, and the best found so far."""

    def __init__(
        self, w: Tensor, fmt: Format, where: str, seed: int | None, bounds: Mapping[str, Any] | None = None
    ) -> None:
        self.w, self.fmt, self.where, self.seed = w, fmt, where, seed
        self.plain = fmt.quantize(w, where=where, seed=seed)
        self.target = w.float()
        self.params = {rule.name: self.plain[rule.name] for rule in fmt.param_rules}
        self.objective = Projection(self.target, projected_rank(w.shape[0], w.shape[1], **(bounds or {})))
        self.decoded = self._decode(self.plain)
        self.best, self.least = self.plain, self.objective.loss(self.decoded - self.target)

    def _decode(self, parts: Parts) -> Tensor:
        return self.fmt.dequantize(parts, (self.w.shape[0], self.w.shape[1]), torch.float32)

    def round_at(self, change: Tensor) -> float:
        """L of the plain weight moved by `change` [N, K] and rounded again; kept if it is the least so far."""
        parts = self.fmt.quantize(self.decoded + change, params=self.params, where=self.where, seed=self.seed)
        loss = self.objective.loss(self._decode(parts) - self.target)
        if loss < self.least:
            self.best, self.least = parts, loss
        return loss

    def steps(self) -> Tensor:
        """What one code is worth in the prepared weight, [N, K]."""
        n, k = self.w.shape
        out = torch.empty_like(self.target)
        for start, stop in row_chunks(n, k, max(self.fmt.row_multiple, self.fmt.unit((n, k))[0])):
            rows = self.fmt.prepared(self.w, start, stop, self.where)
            grid = self.fmt.grid(rows, narrow_rows(self.fmt.param_rules, self.params, start, stop))
            by_column = grid.spread(grid.step, 0, k).expand(k, -1)
            out[start:stop] = (by_column if grid.factor is None else by_column * grid.factor.unsqueeze(1)).t()
        return out

    def search(self, make: Callable[[Tensor], Optimizer], iterations: int) -> None:
        """Let an optimizer move the codes, rounding them after each step, until that gains little."""
        steps, codes = self.steps(), torch.zeros_like(self.target)
        optimizer, idle, least = make(codes), 0, torch.inf
        change = torch.zeros_like(self.target)
        for _ in range(iterations):
            seen = self.objective.seen(self.decoded + change - self.target)
            loss = float(torch.linalg.vector_norm(seen, dtype=torch.float64))
            before = self.least
            if loss:
                optimizer.step(self.fmt.prepare(self.objective.back(seen / divisor(loss, seen))) * steps, loss)
            change = self.fmt.restore(codes * steps)
            self.round_at(change)
            gained = self.least < before * (1 - GAIN) or loss < least * (1 - GAIN)
            least, idle = min(least, loss), 0 if gained else idle + 1
            if not loss or idle >= PATIENCE:
                return


_BOUNDS = {"top_p": Option(float, most=1.0, above=True), "min_k": Option(int, least=1), "max_k": Option(int, least=1)}
_SEARCH = {"iterations": Option(int, least=1)}
_RATE = {"lr": Option(float, above=True)}
_WITH_RATE = ("adamw", "radam")


@register_solver("learned_rounding", **_BOUNDS)
def learned_rounding(
    w: Tensor,
    fmt: Format,
    statistics: Statistics | None = None,
    *,
    where: str = "weight",
    seed: int | None = None,
    **bounds: Any,
) -> Parts:
    """The closed form: one change, one rounding. Statistics change nothing. See the module and `Solver`.

    bounds: of `projected_rank`.
    """
    if not w.numel():
        return fmt.quantize(w, where=where, seed=seed)
    problem = _Problem(w, fmt, where, seed, bounds)
    error = problem.decoded - problem.target
    problem.round_at(-problem.objective.back(problem.objective.seen(error)))
    return problem.best


def _register(name: str) -> None:
    options = {**_BOUNDS, **_SEARCH, **(_RATE if name in _WITH_RATE else {})}

    @register_solver(f"learned_rounding_{name}", **options)
    def iterative(
        w: Tensor,
        fmt: Format,
        statistics: Statistics | None = None,
        *,
        where: str = "weight",
        seed: int | None = None,
        iterations: int | None = None,
        lr: float | None = None,
        **bounds: Any,
    ) -> Parts:
        """The same objective, step by step; see the module and `Solver`."""
        if not w.numel():
            return fmt.quantize(w, where=where, seed=seed)
        problem = _Problem(w, fmt, where, seed, bounds)
        make: Callable[..., Optimizer] = OPTIMIZERS[name]
        if lr is not None:
            make = partial(make, rate=lr)
        problem.search(make, iterations or ITERATIONS)
        return problem.best


for _name in OPTIMIZERS:
    _register(_name)
