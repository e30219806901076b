"""`LowbitConfig` as diffusers wants it: one class for both libraries, since pipelines hold models of both."""

from __future__ import annotations

from enum import Enum
from functools import wraps
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from lowbit.integrations.transformers.config import METHOD, LowbitConfig as TransformersConfig


class Method(str, Enum):
    """The quantization method; diffusers asks its name of an enum, transformers takes it for a text."""

    LOWBIT = METHOD


class LowbitConfig(TransformersConfig, QuantizationConfigMixin):
    """How a model is quantized while it loads, in diffusers and in transformers; the fields are those of the latter.

    Without a format it says that the file or folder is quantized already: its weight files describe its layers. Where
    config.json says so itself, diffusers takes that and passes over what it is given; use `model.dequantize()` there.

    Raises `FormatError`, `PlanError` or `SolverError` for a value that is none, or a field that does not exist.
    """

    # diffusers compares the parameters of both libraries' classes, hence `wraps`
    @wraps(TransformersConfig.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = Method.LOWBIT

    def to_diff_dict(self) -> dict[str, Any]:
        """What `repr` shows: the fields that are not at their defaults."""
        return self.to_dict()
