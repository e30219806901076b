"""The linears of a module that are watched, and running the module without changing it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lowbit.errors import PlanError, StatisticsError

from .collection import some

_log = logging.getLogger("lowbit")


def select_linears(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears of a module whose name matches one of the patterns (all without any); one under two names once.

    Raises `StatisticsError` without any linear, `PlanError` for patterns that match none or are wrong.
    """
    linears = {name or "weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise StatisticsError(f"{type(model).__name__} has no nn.Linear inside; pass a module that has")
    if not patterns:
        return linears
    try:
        chosen = {name: linears[name] for name in linears if any(re.search(pattern, name) for pattern in patterns)}
    except re.error as error:
        raise PlanError(f"layers: {error.pattern!r} is no regular expression: {error}; correct it") from error
    if not chosen:
        raise PlanError(f"layers: no linear matches {some(patterns)}; there are {some(linears)}")
    return chosen


def aliases(
    model: nn.Module, linears: Mapping[str, nn.Linear], names: Mapping[str, str | None]
) -> dict[str, tuple[str, ...]]:
    """The names that each linear has in the result: all those of the module, renamed; without those renamed to None.

    Linears without any name are left out. Raises `StatisticsError` when none is left.
    """
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            alias = names.get(name, name or "weight")
            found.setdefault(id(module), []).extend([] if alias is None else [alias])
    named = {name: tuple(found[id(linear)]) for name, linear in linears.items() if found[id(linear)]}
    if not named:
        raise StatisticsError(
            f"none of the {len(linears)} linears of {type(model).__name__} ({some(linears)}) is a layer of the "
            "checkpoint; name the checkpoint of this model"
        )
    if left_out := [name for name in linears if name not in named]:
        _log.warning("left out, the checkpoint has no weight for them: %s", some(left_out))
    return named


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode comes back at the end.

    Not `inference_mode`: a buffer that the model caches in it could never be used with gradients again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
