"""What a model holds and what knows the model in turn, without keeping it alive: memory is free when it is dropped."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from lowbit.integrations.hf_layers import stored_bytes


class OwnModel:
    """A weak reference to the model that holds this object. In a copy of the model it refers to the copy."""

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The model, which lives while it holds this."""
        model = self._reference()
        assert model is not None
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnModel:
        return type(self)(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.model,)


class Footprint(OwnModel):
    """`get_memory_footprint` of one model, in place of the method of diffusers.

    That counts two bytes for each element of a bfloat16 weight, whatever it is stored in.
    """

    def __call__(self, return_buffers: bool = True) -> int:
        """Bytes that the model takes, quantized weights through their parts; with its buffers or without."""
        return stored_bytes(self.model, buffers=return_buffers)
