"""Pipelines of solvers: their names, and which one `auto` takes.

Scales matter where codes are few: a 4-bit format gains 1 to 1.5 dB from a search without any data, an 8-bit one less
than 0.2 dB for many times the work; each format states its choice (`Format.data_free_solver`). With second moments of
the input everything gains from refining, by 10 log10(tr H / tr D) of the output error whatever the width of the codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowbit.errors import SolverError
from lowbit.formats.base import Format

from .base import Statistics, solver, solvers
from .refinement import Refinement, refinements

AUTO = "auto"
AWQ = "awq"
SVDQUANT = "svdquant"
SCALE_SEARCH = "scale_search"
BIAS = "bias"
_JOINT = re.compile(r"\+(?![^(]*\))")  # not within the parenthesis of options, as in 1e+2
Known = str
"""What is known of a layer's input: "" for nothing, "diagonal" or "full" second moments."""


@dataclass(frozen=True)
class Pipeline:
    """A start, the refinements after it, and whether the bias makes up for the mean error."""

    start: str
    steps: tuple[str, ...] = ()
    bias: bool = False

    @property
    def name(self) -> str:
        """As it is written: parts joined by "+"."""
        return "+".join((self.start, *self.steps, *((BIAS,) if self.bias else ())))

    @property
    def refinements(self) -> list[Refinement]:
        """The functions of the steps."""
        known = refinements()
        return [known[step] for step in self.steps]


def parse_pipeline(name: str) -> Pipeline:
    """Read `start+refinement+...+bias`. Without a start, `scale_search` is one; a start may have options.

    Raises `SolverError` for an unknown part, listing the known ones, or for one out of place, and for options that a
    start does not have.
    """
    starts, steps = solvers(), refinements()
    parts = ["".join(part.split()) for part in _JOINT.split(name)]
    bare = parts[0].partition("(")[0]
    if bare in starts and bare != parts[0]:
        solver(parts[0])
        starts = {**starts, parts[0]: starts[bare]}
    for part in parts:
        if part not in starts and part not in steps and part != BIAS:
            known = f"{', '.join([AUTO, *solvers()])}; refinements: {', '.join(steps)}, {BIAS}"
            raise SolverError(f"unknown solver {part!r}; known solvers: {known}; join them as in scale_search+gptq")
    first, rest = (parts[0], parts[1:]) if parts[0] in starts else (SCALE_SEARCH, parts)
    bias = rest[-1:] == [BIAS]
    rest = rest[: len(rest) - bias]
    wrong = [part for part in rest if part not in steps]
    if wrong:
        raise SolverError(f"{name!r}: {wrong[0]} is out of place: a start, then refinements, then {BIAS}")
    return Pipeline(first, tuple(rest), bias)


def misfit(pipeline: Pipeline, fmt: Format) -> str | None:
    """Why a pipeline does not give the parts of a format, or None.

    A pre_quant_scale is chosen by awq alone, and svdquant makes a low rank; not every format has a static input scale.
    """
    if fmt.input_scale and not fmt.largest_activation:
        return "has no static scale of activations; leave input_scale out"
    if fmt.pre_quant_scale and pipeline.start != AWQ:
        return f"stores a pre_quant_scale, which {pipeline.name} does not choose; start with {AWQ}, as in {AWQ}+gptq"
    if pipeline.start == AWQ and not fmt.pre_quant_scale:
        return f"has no pre_quant_scale for {AWQ} to choose; give it pre_quant_scale=true, or start with scale_search"
    if pipeline.start == SVDQUANT and fmt.calibrated_start != SVDQUANT:
        return f"has no low-rank branch, so {SVDQUANT} does not apply; use scale_search"
    return None


def what_is_known(statistics: Statistics | None) -> Known:
    """Which second moments these statistics hold."""
    if statistics is None or statistics.hessian is None:
        return ""
    return "full" if statistics.hessian.dim() == 2 else "diagonal"


def pick_solver(name: str, fmt: Format, known: Known = "", *, has_bias: bool = False) -> tuple[str, str]:
    """The pipeline for a format and, in words, why: `name` itself, or what `auto` takes for what is `known`.

    Raises `SolverError` for a name that is none, for a pipeline that does not fill the format, and when nothing is
    known of the input of a format that stores something about it.
    """
    if name == AUTO:
        pipeline, why = _automatic(fmt, known, has_bias=has_bias)
    else:
        pipeline, why = parse_pipeline(name), "as asked"
        if pipeline.start == SVDQUANT and not known:
            why += "; it needs second moments of the input, and without them it is scale_search"
    if misfits := misfit(pipeline, fmt):
        raise SolverError(f"{fmt} {misfits}")
    return pipeline.name, why


def _automatic(fmt: Format, known: Known, *, has_bias: bool) -> tuple[Pipeline, str]:
    """What `auto` takes, and why. Raises as `pick_solver`."""
    if fmt.pre_quant_scale and not known:
        raise SolverError(f"{fmt} stores a pre_quant_scale, which needs second moments of the input; calibrate")
    start = fmt.data_free_solver
    if not known:
        return parse_pipeline(start), f"auto: the default of {fmt.name} without calibration data"
    start = AWQ if fmt.pre_quant_scale else fmt.calibrated_start
    if known == "diagonal":
        return parse_pipeline(start), "auto: second moments of single channels are known"
    return Pipeline(start, ("gptq", "descent"), has_bias), "auto: second moments of the input are known"
