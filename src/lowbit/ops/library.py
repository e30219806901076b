"""The `lowbit::` operator library: how an op is declared.

Each op has a schema, an implementation that asks the dispatch table for a kernel, a fake for tracing and, where an
input can need a gradient, an autograd formula. Schemas take no defaults: a default together with autograd breaks the
backward pass of PyTorch's operator registration; the Python functions in front of the ops have them instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from lowbit.dispatch import select

LIBRARY = torch.library.Library("lowbit", "DEF")  # kept alive: dropping it would remove the ops


def declare(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Declare `lowbit::<schema>` and return its callable. The implementation serves every device."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lowbit::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.lowbit, name).default


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation outside any autocast region.

    A region would cast the operands of the matrix products inside a kernel: integers in float32 would no longer be
    exact, and the result would not have the dtype that the fake promises.
    """

    @wraps(implementation)
    def call(*args: Any) -> Any:
        with torch._C._DisableAutocast():  # noqa: SLF001  (the public one needs a device and costs ten times more)
            return implementation(*args)

    return call


def run(op: str, device: torch.device, *args: Any) -> Any:
    """Run a named op (one that belongs to no registered format's generic path) through the dispatch table."""
    return select(op, "*", "", device.type, args).run(*args)
