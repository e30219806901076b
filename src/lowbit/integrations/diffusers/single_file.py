"""Single files of ComfyUI and others, whose names diffusers converts to its own before it loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.errors import CheckpointError
from lowbit.integrations.diffusers.stored_layers import (
    StoredLayers,
    add_biases,
    describe_state,
    refuse_missing,
    widened,
)
from lowbit.integrations.hf_files import describe_files, fitted_to, remember_options
from lowbit.tensor import QuantizedTensor
from lowbit.tensor.handlers import fallbacks

WHERE = "the checkpoint"  # diffusers does not tell its name
_PREFIX = "model.diffusion_model."  # ComfyUI's, for which some of diffusers' conversions do nothing


def read_single_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file for `from_single_file`, each quantized layer as one `QuantizedTensor`.

    Needed only for files whose layers are described in the header or in a config.json beside them, neither of which
    diffusers passes on: `Model.from_single_file(read_single_file(path), quantization_config=LowbitConfig())`.

    Raises `CheckpointError` (or `PartsError`, `FormatError`, `UnknownFormatError`) naming file and layer.
    """
    files = describe_files([path])
    state = load_file(path)
    return StoredLayers(files).take(state) if files.found.layers else state


class SingleFile:
    """One checkpoint on its way through diffusers' conversion. `state`: its tensors, layers made whole.

    `quantized`: whether any layer is.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        given = any(isinstance(value, QuantizedTensor) for value in state.values())
        files = None if given else describe_state(state, WHERE)
        self._stored = StoredLayers(files) if files is not None and files.found.layers else None
        self.state = widened(dict(state) if self._stored is None else self._stored.take(state))
        self.quantized = given or self._stored is not None
        self._storages = {_storage(v) for v in self.state.values() if isinstance(v, Tensor) and _is_plain(v)}
        self._fallbacks = fallbacks()

    def check(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Check the converted tensors against a model that is on the meta device.

        A prefix that diffusers' conversion left in front of every name is taken off, in place. Raises `CheckpointError`
        naming what is missing, has no place, is of another shape, or could not be converted.
        """
        self._refuse_dequantized(model, state)
        if not model.state_dict().keys() & state.keys():
            for key in [key for key in state if key.startswith(_PREFIX)]:
                state[key.removeprefix(_PREFIX)] = state.pop(key)
        weights = {}
        for name, value in state.items():
            if isinstance(value, QuantizedTensor) and self._has_place(model, name):
                layer = name.rpartition(".")[0]
                self._fit(model, layer, value)
                weights[layer] = value
        add_biases(model, weights, state, WHERE)
        refuse_missing(model, state, WHERE)

    def _fit(self, model: nn.Module, name: str, weight: QuantizedTensor) -> None:
        layer = model.get_submodule(name)
        fitted_to(StoredLayer(name, weight.format, (weight.shape[0], weight.shape[1]), where=WHERE), layer, name)
        stored = self._stored.options_of(name, weight) if self._stored is not None else None
        if stored is not None:
            remember_options(layer, stored)

    def _has_place(self, model: nn.Module, name: str) -> bool:
        """Whether the model has this weight. What is of other models in the same file is not for it."""
        layer, _, attribute = name.rpartition(".")
        if attribute == "weight" and layer in dict(model.named_modules()):
            return True
        if name.partition(".")[0] in dict(model.named_children()):
            raise CheckpointError(
                f"{WHERE}: layer {layer!r}: is quantized, and {type(model).__name__} has no such layer; load it with "
                "the class and config that it was made for"
            )
        return False

    def _refuse_dequantized(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """A weight that the conversion could only treat as plain numbers is not what the file says any more."""
        before, after = self._fallbacks, fallbacks()
        done = sorted(name for name, count in after.items() if count > before.get(name, 0))
        if not done:
            return
        linears = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        plain = {name for name in linears & state.keys() if _is_plain(state[name])}
        made = sorted(name for name in plain if _storage(state[name]) not in self._storages)
        raise CheckpointError(
            f"{WHERE}: diffusers' conversion for {type(model).__name__} does {', '.join(done)} to quantized weights, "
            f"which cannot be done to their codes (for {', '.join(made) or 'layers that it then drops'}); convert the "
            "original in diffusers' own form with lowbit convert, or keep these layers"
        )


def _is_plain(value: Tensor) -> bool:
    return not isinstance(value, QuantizedTensor)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
