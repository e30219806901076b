"""linear of a weight in the layout coalesced_int4: the product `int4_plain_mm` of its operands, whatever the backend.

Activations are rounded to int8 on every backend, the reference included: the layout says so, not the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import coalesced_int4

Product = Callable[[Tensor, Tensor, Tensor, Any, "Tensor | None", int], Tensor]
Refusal = Callable[[Tensor, Tensor, Tensor, Any, "Tensor | None", int], "str | None"]


def serve(
    backend: str, product: Product, refuses: Refusal | None = None, *, tolerance: float = 0.0, fills: bool = True
) -> None:
    """Register a backend's kernel of `int4_plain_mm`, with what it refuses, as `linear` for the layout.

    `fills`: whether a weight without zero points comes with a tensor of eights; else with None in its place.
    """

    def arguments(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Any:
        qdata, scale = parts["qdata"], parts["scale"]
        zero = coalesced_int4.operands(parts)[2] if fills else coalesced_int4.zeros(parts)
        return x, qdata, scale, zero, bias, int(fmt.config()["group_size"]) or x.shape[-1]

    def linear_coalesced_int4(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """x [..., K], parts in coalesced_int4, bias [N] or None -> [..., N] in the dtype of x."""
        return product(*arguments(fmt, x, parts, bias))

    def refuses_linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
        return None if refuses is None else refuses(*arguments(fmt, x, parts, bias))

    for name in coalesced_int4.FORMATS:
        kernel(
            "linear", format=name, backend=backend, layout=coalesced_int4.NAME, refuses=refuses_linear,
            tolerance=tolerance,
        )(linear_coalesced_int4)  # fmt: skip
