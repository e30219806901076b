"""Every error lowbit raises on purpose.

A message names the file and the layer it is about, says what was expected and what was found, and ends with what to do.
All kinds derive from `LowbitError`, so a program that embeds lowbit catches one class.
"""

from __future__ import annotations

from collections.abc import Iterable


class LowbitError(Exception):
    """The base of every error that lowbit raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the repr of its argument, with quotes and escapes
        return str(self.args[0]) if self.args else ""


class FormatError(LowbitError, ValueError):
    """A format or a spec string is wrong: an unknown field, a bad value, a name registered twice."""


class UnknownFormatError(FormatError, KeyError):
    """A name is not a registered format. Both a `KeyError` and a `ValueError`: integrations assert either."""

    def __init__(self, name: object, known: Iterable[str], where: str = "") -> None:
        place = f" in {where}" if where else ""
        super().__init__(f"unknown format {name!r}{place}; known formats: {', '.join(sorted(known))}")


class WeightError(LowbitError, ValueError):
    """A weight cannot be quantized: not finite, of the wrong rank or dtype, or of a shape the format cannot hold."""


class PartsError(LowbitError, ValueError):
    """The stored tensors of a quantized weight are missing, misshapen, of the wrong dtype or in the wrong layout."""


class UnsupportedError(LowbitError, NotImplementedError):
    """No kernel can do what was asked. `refusals` holds every candidate's reason."""

    def __init__(self, message: str, refusals: dict[str, str] | None = None) -> None:
        self.refusals = dict(refusals or {})
        lines = "".join(f"\n  {name}: {why}" for name, why in self.refusals.items())
        super().__init__(message + lines)


class PlanError(LowbitError, ValueError):
    """A plan, a preset or a selection of layers is wrong."""


class CheckpointError(LowbitError, OSError):
    """A file cannot be read or written as a checkpoint, or its contents contradict themselves."""


class WriteError(CheckpointError):
    """What was to be written cannot be: no such folder, no permission, no space, or the place holds something else."""


class SolverError(LowbitError, ValueError):
    """A solver is unknown, or cannot work on the format or without the statistics it needs."""


class StatisticsError(LowbitError, ValueError):
    """Calibration cannot be done on what was given, or its statistics are damaged or those of another model."""


class DependencyError(LowbitError, ImportError):
    """An integration needs another package, or another version of it, than what is installed.

    `asked_for`: the user named what is missing, so that nothing else may take its place.
    """

    def __init__(self, message: str, *, asked_for: bool = False) -> None:
        super().__init__(message)
        self.asked_for = asked_for
