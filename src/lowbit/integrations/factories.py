"""A user's function that makes a model and its inputs, named on the command line."""

from __future__ import annotations

import pkgutil
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import LowbitError, PlanError, StatisticsError


def call_factory(spec: str, factory: Callable[[], Any] | None = None) -> tuple[nn.Module, Iterable[Any]]:
    """The module and the iterable of inputs that the function `PACKAGE.MODULE:FUNCTION` or `FILE.py:FUNCTION` returns.

    `factory`: the function, where it has been found already. Raises `PlanError` when there is no such function,
    `StatisticsError` when it raises or returns something else.
    """
    if factory is None:
        factory = find_factory(spec)
    try:
        made = factory()
    except LowbitError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise StatisticsError(f"{spec}: raised {type(error).__name__}: {error}{_line_of(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise StatisticsError(
            f"{spec}: returned {_kind(made)}; it must return a pair: a torch.nn.Module and an iterable of its inputs"
        )
    return made


def find_factory(spec: str) -> Callable[[], Any]:
    """The function that `PACKAGE.MODULE:FUNCTION` or `FILE.py:FUNCTION` names. Raises `PlanError`.

    Packages are also looked for in the working directory.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise PlanError(f"--module {spec!r}: write it as PACKAGE.MODULE:FUNCTION or FILE.py:FUNCTION")
    factory = _find(spec, place, name)
    if not callable(factory):
        raise PlanError(f"--module {spec!r}: {name} is a {type(factory).__name__}, not a function")
    return factory


def _find(spec: str, place: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    if place.endswith(".py") and not Path(place).is_file():
        raise PlanError(f"--module {spec!r}: there is no file {place}; correct the path")
    try:
        if not place.endswith(".py"):
            return pkgutil.resolve_name(spec)
        made = runpy.run_path(place)
    except Exception as error:  # an import runs the user's code
        raise PlanError(
            f"--module {spec!r}: cannot be imported: {type(error).__name__}: {error}{_line_of(error)}"
        ) from error
    if name not in made:
        raise PlanError(f"--module {spec!r}: {place} has no {name}; name a function in it")
    return made[name]


def _line_of(error: BaseException) -> str:
    """Where the user's code raised, as " (file, line n)"."""
    trace = error.__traceback__
    last = None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return "" if last is None else f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})"


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in made) or 'nothing'}"
    return f"a {type(made).__name__}"
