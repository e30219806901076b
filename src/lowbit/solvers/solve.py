"""Solving a layer: a pipeline of one start and any number of refinements, judged on samples it has not seen.

A pipeline is written `start+refinement+...`, as in `scale_search+gptq+descent+bias`. The start makes parts from a
weight (`base.register_solver`); refinements improve them against H (`refinement.register_refinement`); `bias` makes up
for the mean error in the layer's bias. (Refining against the covariance of the input instead of H, as a bias that takes
the mean error would allow, was better on text of the calibration's kind and worse on another: 0.336 against 0.325 of
plain rounding's error for 4-bit weights of a sentence model.)

Statistics come in two halves. The refinements are tried on some rows with H of one half and judged with H of the other.
If they beat rounding to nearest and the start there, all rows are solved with H of both halves, and the result is kept
if it is no worse than rounding to nearest on the half held out, nor can be expected to be on other inputs (`unseen`).
If not, a stronger shrinkage is tried, then the start alone, and at last nothing but rounding is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.groups import round_up
from lowbit.ops.encode import decode_rows, encode

from .activations import activation_loss
from .attempt import Attempt, Lost, ratio
from .base import Statistics, solver
from .curvature import NotPositiveDefiniteError, energy, no_second_moment, output_loss, output_signal, shrinkage
from .input_scale import FRACTION, input_scale, transformed
from .lazy import lazy
from .pipeline import AUTO, SCALE_SEARCH, SVDQUANT, Pipeline, parse_pipeline, pick_solver, what_is_known
from .refinement import Unrefined, refine
from .row_coupling import GradientsError, refine_coupled
from .unseen import Trial, row_shares

_TRIAL_SHARE, _TRIAL_ROWS = 8, (64, 512)  # an eighth of the rows, within these
_LEAST = 0.01  # of the median second moment of a channel: the mean may be that of a few outliers
_STRONGER = 0.5  # the shrinkage of the second attempt
_MANY = 4  # tokens a channel with which a low rank fits less than 0.1 dB of noise


@dataclass(frozen=True)
class Solution:
    """What a layer became.

    `bias`: float32 [N] to add to the layer's true bias, or None. `solver`: the pipeline that made the parts; less than
    was asked for where that lost. `note`: why, in words. `error`, `rtn_error`: tr(G E H E^T) / tr(G W H W^T) on the
    samples held out, of the parts and of rounding to nearest (G the identity where the gradient is not known); None
    without statistics. `unseen_error`: what to expect instead of `error` on inputs that are not among the samples,
    which the parts were made of (`rtn_error` is that already); None where no samples were held out, so that nobody
    knows. `signal`: tr(G W H W^T) itself; layers with G known can be compared by it.
    """

    parts: Parts
    solver: str
    bias: Tensor | None = None
    note: str = ""
    error: float | None = None
    rtn_error: float | None = None
    signal: float | None = None
    unseen_error: float | None = None

    def on(self, device: torch.device) -> Solution:
        """With parts and bias on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()}, bias=bias)


def solve(
    w: Tensor,
    fmt: Format,
    name: str = AUTO,
    statistics: Statistics | None = None,
    *,
    where: str = "weight",
    seed: int | None = None,
    has_bias: bool = False,
    given_scale: float | None = None,
    fraction: float = FRACTION,
) -> Solution:
    """Quantize a weight [N, K] (any float dtype).

    name: a pipeline, or "auto" for the best one for the format and for what is known. `has_bias`: the layer has a bias
    that can take a correction. `where` names the layer in errors. With a `seed`, codes are rounded stochastically, and
    there is no refining. For a format with a static scale of its input: `given_scale`, that scale of the input as the
    kernel gets it, or else it covers a `fraction` of the elements that the statistics counted.

    Raises `WeightError` for a weight that cannot be stored; `SolverError` for an unknown solver, for one that needs
    statistics where there are none, and for statistics of another layer or that are not finite.
    """
    fmt.check_weight(w, where)
    if fmt.input_scale:
        bare = replace(fmt, input_scale=False)
        if not fmt.largest_activation or (statistics is None and given_scale is None):
            input_scale(None, fmt, where=where)  # says why not, before all work
        solution = solve(w, bare, name, statistics, where=where, seed=seed, has_bias=has_bias)
        if given_scale is None:
            scale = _counted_scale(w, fmt, statistics, solution.parts, fraction, where)
        else:
            scale = torch.tensor(given_scale, dtype=torch.float32)
        return replace(solution, parts={**solution.parts, "input_scale": scale.to(w.device)})
    chosen, note = chosen_pipeline(w, fmt, name, statistics, where, seed, has_bias=has_bias)
    if statistics is None or not what_is_known(statistics) or not w.numel():
        return Solution(solver(chosen.start)(w, fmt, statistics, where=where, seed=seed), chosen.start, note=note)
    statistics.check(w.shape[0], w.shape[1], where)
    found = Problem(w, fmt, chosen, statistics.on(w.device), where, seed).best()
    return replace(found, note="; ".join(filter(None, (note, found.note))))


def chosen_pipeline(
    w: Tensor,
    fmt: Format,
    name: str,
    statistics: Statistics | None,
    where: str,
    seed: int | None,
    *,
    has_bias: bool,
) -> tuple[Pipeline, str]:
    """The pipeline that a layer can have, and what it lacks of the one asked for, in words. Raises as `solve`."""
    known = what_is_known(statistics)
    chosen = parse_pipeline(pick_solver(name, fmt, known, has_bias=has_bias)[0])
    if seed is not None and (chosen.steps or chosen.bias):
        raise SolverError(f"{where}: {chosen.name} does not round stochastically; leave the seed out or use rtn")
    if chosen.steps and known != "full" and w.numel():
        raise SolverError(
            f"{where}: {chosen.name} needs second moments [K, K] of the layer's input, and "
            f"{'only their diagonal is known' if known else 'there are none'}; calibrate, or use scale_search"
        )
    mean_missing = chosen.bias and has_bias and (statistics is None or statistics.mean is None)
    note = "the bias stays: the mean of the input is not known" if mean_missing else ""
    if mean_missing or not has_bias:
        chosen = Pipeline(chosen.start, chosen.steps)
    return chosen, note


def _counted_scale(
    w: Tensor, fmt: Format, statistics: Statistics | None, parts: Parts, fraction: float, where: str
) -> Tensor:
    """The static scale of the input that calibration saw, as the kernel gets it with these parts of the weight."""
    assert statistics is not None
    seen = transformed(statistics, fmt, w.shape[1], parts.get("pre_quant_scale"), where)
    return input_scale(seen, fmt, fraction, where)


@dataclass(frozen=True)
class Problem:
    """A layer to solve with second moments of its input.

    `start`: the parts that its pipeline starts with; None: what the start makes of this weight alone.
    """

    w: Tensor
    fmt: Format
    pipeline: Pipeline
    statistics: Statistics
    where: str
    seed: int | None
    start: Parts | None = None

    def best(self) -> Solution:
        """The first attempt that is no worse than rounding to nearest on the samples held out."""
        plain = encode(self.w, self.fmt, where=self.where, seed=self.seed)
        if self.fmt.pre_quant_scale:
            dtype = self.fmt.part_dtypes(self.w.dtype)["pre_quant_scale"]
            plain["pre_quant_scale"] = torch.ones(self.w.shape[1], dtype=dtype, device=self.w.device)
        rounded = self._lost(plain, None)
        if self.pipeline.name == "rtn":  # made from no samples at all
            lost = rounded if self.start is None else self._lost(self.start, None)
            return self._solution(Attempt("rtn", self.start or plain), [], lost, rounded)
        notes = [] if self._held_out else ["judged on the samples it was made from: there are no others"]
        for attempt in self._attempts(plain, notes):
            bias = self._bias(self.w, attempt.parts) if self.pipeline.bias else None
            lost = self._lost(attempt.parts, bias)
            if lost.error > rounded.error:
                notes.append(f"{attempt.name} was worse than rounding to nearest on the samples held out")
                continue
            found = self._solution(replace(attempt, bias=bias), notes, lost, rounded)
            if found.unseen_error is None or found.unseen_error <= rounded.error:
                return found
            notes.append(f"{attempt.name} was better on its own samples, but hardly is on others")
        return self._solution(Attempt("rtn", plain), notes, rounded, rounded)

    def _solution(self, attempt: Attempt, notes: list[str], lost: Lost, rounded: Lost) -> Solution:
        unseen = self._unseen_error(attempt, lost, rounded) if self._held_out else None
        told = "; ".join(notes)
        return Solution(
            attempt.parts, attempt.name, attempt.bias, told, lost.error, rounded.error, self._signal, unseen
        )

    # ---- attempts ---------------------------------------------------------------------------------------------------

    def _attempts(self, plain: Parts, notes: list[str]) -> Iterator[Attempt]:
        name, known = self.pipeline.start, self.for_start
        alone = name == SVDQUANT and self.start is None
        try:
            try:
                start = self.start or self._started(name, known)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # svdquant solves under H
                raise NotPositiveDefiniteError(no_second_moment(self.where)) from error
            trial = self._trial(start, plain, notes) if self.pipeline.steps else None
            if trial is not None:
                yield from self._all_refined(start, trial, notes)
        except NotPositiveDefiniteError as error:
            notes.append(f"only the diagonal was used: {error}")
            if alone:
                start = self._started(name, known.of_channels)
        yield Attempt(Pipeline(name, bias=self.pipeline.bias).name, start)
        if alone:
            start = self._started(SCALE_SEARCH, known)
            yield Attempt(Pipeline(SCALE_SEARCH, bias=self.pipeline.bias).name, start)

    def _started(self, name: str, known: Statistics) -> Parts:
        return solver(name)(self.w, self.fmt, known, where=self.where, seed=self.seed)

    def _all_refined(self, start: Parts, trial: Trial, notes: list[str]) -> Iterator[Attempt]:
        """Against the error of the model's output, where that is known, and against that of the layer's."""
        hessian, outputs = self.statistics.combined, self.statistics.combined_output
        if outputs is not None:
            try:
                parts = self._refined(self.w, start, hessian, trial.amount, outputs=outputs)
                yield Attempt(self.pipeline.name, parts, trial, rows_coupled=True)
            except GradientsError as error:
                notes.append(f"rows were solved one by one: {error}")
        yield Attempt(self.pipeline.name, self._refined(self.w, start, hessian, trial.amount), trial)

    @lazy
    def for_start(self) -> Statistics:
        """The statistics with a floor under each channel: one that was never seen is not to be clipped freely."""
        hessian = self.statistics.hessian
        assert hessian is not None
        floored = hessian.clone()
        diagonal = floored.diagonal() if floored.dim() == 2 else floored
        diagonal.clamp_(min=float(diagonal.median()) * _LEAST)
        return replace(self.statistics, hessian=floored)

    def _trial(self, start: Parts, plain: Parts, notes: list[str]) -> Trial | None:
        """One on some rows that beats rounding to nearest and the start on the half that it did not see, or None."""
        known, (n, k) = self.statistics, self.w.shape
        usual = shrinkage(known.total_tokens, k, broad=known.broad)
        if not self._held_out:
            return Trial(1.0, 1.0, usual)
        most = min(max(_TRIAL_ROWS[0], n // _TRIAL_SHARE), _TRIAL_ROWS[1])
        rows = min(n, round_up(most, self.fmt.row_multiple))
        some, (begun, rounded) = self.w[:rows], (narrow_rows(self.fmt.rules, x, 0, rows) for x in (start, plain))
        plain_other = self._loss(some, rounded)
        least = min(plain_other, self._loss(some, begun))
        for amount in (max(usual, shrinkage(known.tokens, k, broad=known.broad)), _STRONGER):
            tried = self._refined(some, begun, known.hessian, amount)
            other = self._loss(some, tried)
            if other <= least:
                seen, plain_seen = (output_loss(some, self.fmt, x, known.hessian) for x in (tried, rounded))
                mean = self._mean_loss(some, tried)
                shares = ratio(max(seen - mean, 0.0), plain_seen), ratio(max(other - mean, 0.0), plain_other)
                return Trial(*shares, usual if amount < _STRONGER else amount, known.share)
            notes.append(f"a trial with H shrunk by {amount:g} lost")
        return None

    def _refined(
        self,
        w: Tensor,
        start: Parts,
        hessian: Tensor | None,
        amount: float,
        *,
        outputs: Tensor | None = None,
    ) -> Parts:
        assert hessian is not None
        steps, given = self.pipeline.refinements, Unrefined(w, self.fmt, start, hessian, amount, self.where)
        return refine(given, steps) if outputs is None else refine_coupled(given, steps, outputs)

    # ---- judging ----------------------------------------------------------------------------------------------------

    @property
    def _held_out(self) -> bool:
        return self.statistics.held_out is not None and self.statistics.held_out_tokens > 0

    @property
    def _judge(self) -> Tensor | None:
        return self.statistics.held_out if self._held_out else self.statistics.hessian

    @property
    def _output_judge(self) -> Tensor | None:
        known = self.statistics
        return known.output_held_out if self._held_out and known.output_held_out is not None else known.output_hessian

    def _bias(self, w: Tensor, parts: Parts) -> Tensor | None:
        """(W - Wq) E[x], float32 [N]: what the output lacks on average."""
        mean, pieces = self.statistics.sure_mean, []
        if mean is None:
            return None
        for start, stop in self.fmt.row_ranges(w.shape[0], w.shape[1]):
            decoded = decode_rows(self.fmt, parts, w.shape[1], start, stop)
            pieces.append((w[start:stop].float() - decoded) @ mean)
        return torch.cat(pieces)

    def _loss(self, w: Tensor, parts: Parts) -> float:
        return output_loss(w, self.fmt, parts, self._judge)

    def _mean_loss(self, w: Tensor, parts: Parts) -> float:
        """What of tr(E H E^T) is the mean error's, which the pipeline corrects; 0 where it does not."""
        bias = self._bias(w, parts) if self.pipeline.bias else None
        return 0.0 if bias is None else energy(bias.unsqueeze(0), None)

    @lazy
    def _signal(self) -> float:
        return output_signal(self.w, self._judge, self._output_judge)

    def _lost(self, parts: Parts, bias: Tensor | None) -> Lost:
        outputs = self._output_judge
        lost = output_loss(self.w, self.fmt, parts, self._judge, outputs)
        if bias is not None:  # what is left around the mean
            lost -= energy(bias.unsqueeze(1), None, outputs)
        by_input = activation_loss(self.fmt, parts, self.statistics.samples, outputs)
        return Lost(max(lost, 0.0), by_input, self._signal)  # of few tokens, rounding may put it below zero

    def _unseen_error(self, attempt: Attempt, lost: Lost, rounded: Lost) -> float:
        """What to expect of inputs that are not among the samples; see `unseen`."""
        known, trial = self.statistics, attempt.trial
        if trial is None:
            return self._unseen_start(attempt, lost)
        if attempt.rows_coupled and known.output_hessian is not None and known.output_held_out is not None:
            trial = trial.along_rows(row_shares(self.w, self.fmt, known.output_hessian, known.output_held_out))
        return replace(lost, weight=trial.expected(lost.weight, rounded.weight)).error

    def _unseen_start(self, attempt: Attempt, lost: Lost) -> float:
        """The same of a start. It is made of one half alone, but for awq's one exponent and svdquant's low rank."""
        hessian, few = self.statistics.hessian, self.statistics.tokens < _MANY * self.w.shape[1]
        if attempt.name.split("+")[0] != SVDQUANT or hessian is None or hessian.dim() == 1 or not few:
            return lost.error
        try:
            one_half = self._started(SVDQUANT, replace(self.for_start, held_out=None, held_out_tokens=0))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return lost.error
        seen, other = (output_loss(self.w, self.fmt, one_half, h) for h in (hessian, self._judge))
        seen, other = ratio(seen, output_signal(self.w, hessian)), ratio(other, output_signal(self.w, self._judge))
        return replace(lost, weight=lost.weight * Trial(seen, other, share=self.statistics.share).excess).error
