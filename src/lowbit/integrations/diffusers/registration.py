"""Making the quantization method "lowbit" known to diffusers, once."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lowbit.errors import DependencyError
from lowbit.integrations.diffusers.config import LowbitConfig
from lowbit.integrations.diffusers.quantizer import LowbitQuantizer
from lowbit.integrations.transformers.config import METHOD


def register() -> None:
    """Register config and quantizer with diffusers; again is the same as once, also after a reload.

    diffusers has no function for it: the methods it knows are two dictionaries.

    Raises `DependencyError` when another package has taken the name.
    """
    for known, kind in ((AUTO_QUANTIZATION_CONFIG_MAPPING, LowbitConfig), (AUTO_QUANTIZER_MAPPING, LowbitQuantizer)):
        _put(known, kind)


def _put(known: dict[str, Any], kind: type) -> None:
    there = known.get(METHOD, kind)
    if (there.__module__, there.__qualname__) != (kind.__module__, kind.__qualname__):
        raise DependencyError(
            f"diffusers knows a quantization method {METHOD!r} already, of {there.__module__}; one process can use "
            "only one of the two: import the other one elsewhere"
        )
    known[METHOD] = kind
