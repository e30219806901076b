"""`full_precision_matrix_mult` in the marker of a ComfyUI layer: the runtime must not quantize its activations.

ComfyUI rounds the input of a layer in fp8, mxfp8 or nvfp4 to the format of the weight where the GPU multiplies such
codes; with the option it decodes the weight instead. Layers with outliers in their input lose less so, and run slower.
"""

from __future__ import annotations

from lowbit.formats.base import Format

from .dialects import Dialect

OPTION = "full_precision_matrix_mult"
HONOURED = ("fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4")
"""The formats that do not say by themselves what becomes of the input."""


def refuses_option(fmt: Format) -> str | None:
    """Why the marker of a layer in a format cannot say it, in words, or None."""
    if fmt.rounds_input:
        other = fmt.config().get("activations")
        remedy = "write it with activations=none" if other is not None else "leave the layer out"
        return f"{fmt} rounds its input by definition, which {OPTION} contradicts; {remedy}"
    return None if fmt.name in HONOURED else f"{fmt} never rounds its input, so {OPTION} says nothing; leave it out"


def lacks_option(dialect: Dialect) -> str | None:
    """Why a dialect has no place for it, or None."""
    if dialect.name == "comfy":
        return None
    return f"{OPTION} is a field of ComfyUI's markers, for which {dialect.name} has no place; leave it out"
