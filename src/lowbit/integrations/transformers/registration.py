"""Making the quantization method "lowbit" known to transformers, once."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lowbit.errors import DependencyError
from lowbit.integrations.transformers.config import METHOD, LowbitConfig
from lowbit.integrations.transformers.quantizer import LowbitHfQuantizer


def register() -> None:
    """Register config and quantizer with transformers; again is the same as once, also after a reload.

    Raises `DependencyError` when another package has taken the name.
    """
    _put(AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, LowbitConfig)
    _put(AUTO_QUANTIZER_MAPPING, register_quantizer, LowbitHfQuantizer)


def _put(known: dict[str, Any], registers: Any, kind: type) -> None:
    there = known.get(METHOD)
    if there is kind:
        return
    if there is not None:
        if (there.__module__, there.__qualname__) != (kind.__module__, kind.__qualname__):
            raise DependencyError(
                f"transformers knows a quantization method {METHOD!r} already, of {there.__module__}; one process can "
                "use only one of the two: import the other one elsewhere"
            )
        del known[METHOD]  # the same class before this package was reloaded
    registers(METHOD)(kind)
