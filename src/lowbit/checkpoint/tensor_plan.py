"""The plan of one tensor: what becomes of it, and why. Data only; it can be written, edited and run.

>>> from lowbit.checkpoint.tensor_plan import TensorPlan
>>> TensorPlan("a.weight", "keep", "1-D", (8,), "bfloat16").bytes_before
16
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowbit.errors import LowbitError, PlanError
from lowbit.formats.base import Format
from lowbit.formats.registry import parse_spec
from lowbit.solvers import Pipeline, fraction_problem, misfit, parse_pipeline, scale_problem

from .banks import stored_specs
from .dialects.base import Dialect, StoredLayer, TensorSpec, join_key, layer_of
from .eligibility import cannot_hold, cannot_store, dtype_name
from .full_precision import OPTION, lacks_option, refuses_option
from .safetensors_header import DTYPES
from .stored_format import StoredFormat
from .weight_shape import WeightShape, refusal, value_dtype

ACTIONS = ("quantize", "keep", "drop")
_NUMBERS = ("input_scale", "input_percentile")
_MAX_NUMEL = 2**63 - 1  # what torch counts
_DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor. `shape` and `dtype` are those of the source; a quantized source's are logical.

    `action`: "quantize" stores it in `format` (a spec, with "@" and a layout behind it or without) with codes chosen by
    `solver`; "keep" copies it; "drop" leaves it out. `why` is for readers. `was`: the format in which the source stores
    it, when it is quantized already. `name`: the layer, where the key does not tell (another tool's codes, and codes of
    a parameter without ".weight"). `axes`: what the axes of a quantized weight are, where it is no matrix [N, K]:
    "O I ..." of a convolution, "E N K" of a bank of experts, and others of `weight_shape`. `shares`: a name that layers
    have in common which get one smooth_factor and one proj_down (`shared_low_rank`). `options`: "" or
    "full_precision_matrix_mult", which the layer's marker then says (`full_precision`). Of a format with
    `input_scale=true`: `input_scale`, the scale to store, where it is given (`input_scales`); `input_percentile`, the
    fraction of the input that a scale found by calibration covers, where it is not the usual one.
    """

    key: str
    action: str
    why: str
    shape: tuple[int, ...]
    dtype: str
    format: str = ""
    solver: str = ""
    was: str = ""
    name: str = ""
    axes: str = ""
    shares: str = ""
    options: str = ""
    input_scale: float | None = None
    input_percentile: float | None = None

    @property
    def layer(self) -> str:
        """The layer whose weight this is; of another tensor, its key."""
        if self.name:
            return self.name
        layer = layer_of(self.key)
        return self.key if layer is None else layer

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec(_DTYPE_OF[self.dtype], self.shape)

    @property
    def weight(self) -> WeightShape:
        """Its shape with the meaning of its axes."""
        return WeightShape(self.shape, self.axes)

    @cached_property
    def fmt(self) -> Format:
        """The format to store it in. Raises `FormatError` for an empty or wrong spec."""
        return self.stored.format

    @cached_property
    def stored(self) -> StoredFormat:
        """The format and its arrangement in the file. Raises `FormatError` for an empty or wrong spec."""
        return StoredFormat.parse(self.format)

    @property
    def stored_layer(self) -> StoredLayer:
        """The layer as it is to be written."""
        options = self.weight.options(parameter=bool(self.name) or layer_of(self.key) is None)
        options |= {OPTION: True} if self.options else {}
        dtype, layout = value_dtype(self.spec.dtype), self.stored.layout
        return StoredLayer(self.layer, self.fmt, self.weight.matrix, dtype, layout=layout, options=options)

    @property
    def pipeline(self) -> Pipeline:
        """The solver as it is run. Raises `SolverError` for a wrong name."""
        return parse_pipeline(self.solver)

    @property
    def needs_input(self) -> bool:
        """Whether its format stores something about its input that calibration has to tell."""
        return self.fmt.pre_quant_scale or (self.fmt.input_scale and self.input_scale is None)

    @property
    def bytes_before(self) -> int:
        """Its size in the source, in bytes."""
        if self.was:
            n, k = self.weight.matrix
            return self.weight.count * parse_spec(self.was).nbytes(n, k, self.spec.dtype)
        return self.spec.nbytes

    def outputs(self, dialect: Dialect) -> dict[str, TensorSpec]:
        """The tensors that are made of it, by key. Raises `PlanError` for a layer that the dialect has no place for."""
        if self.action == "drop":
            return {}
        if self.action == "keep":
            return {self.key: self.spec}
        if self.options and (why := lacks_option(dialect)):
            raise PlanError(f"layer {self.layer!r}: {why}")
        if why := refusal(dialect, self.stored_layer):
            raise PlanError(
                f"layer {self.layer!r} as {self.format}: {why}; keep this layer, or choose another format or dialect"
            )
        return stored_specs(dialect, self.stored_layer)

    def validate(self) -> None:
        """Raise `PlanError` for anything in it that cannot be done, whatever the source."""
        place = f"plan: tensor {self.key!r}"
        if self.action not in ACTIONS:
            raise PlanError(f"{place}: action is {self.action!r}, expected one of {', '.join(ACTIONS)}")
        if self.dtype not in _DTYPE_OF:
            raise PlanError(f"{place}: dtype {self.dtype!r} is unknown; leave it as `lowbit plan` wrote it")
        if self.action != "quantize":
            return
        try:
            fmt = self.fmt
            misfits = misfit(self.pipeline, fmt)
        except LowbitError as error:
            raise PlanError(f"{place}: {error}") from error
        if misfits:
            raise PlanError(f"{place}: {fmt} {misfits}")
        if self.options not in ("", OPTION):
            raise PlanError(f"{place}: options is {self.options!r}, expected {OPTION!r} or nothing")
        if self.options and (why := refuses_option(fmt)):
            raise PlanError(f"{place}: {why}")
        if why := self._refused_scale():
            raise PlanError(f"{place}: {why}")
        key = join_key(self.layer, "weight") if self.name else self.key
        why = cannot_hold(key, self.spec, requantize=True)  # a plan says what is wanted
        why = why or self.weight.problem or cannot_store(self.stored, self.weight)
        if why:
            raise PlanError(f"{place} cannot become {fmt}: {list(self.shape)} {why}; set its action to keep")

    def _refused_scale(self) -> str | None:
        """Why what it says of the scale of its input cannot be done, or None."""
        given, covered = self.input_scale, self.input_percentile
        if given is None and covered is None:
            return None
        name = "input_percentile" if given is None else "input_scale"
        if not self.fmt.input_scale:
            return f"{self.format} stores no {name}; give it input_scale=true, or remove {name}"
        if given is not None and covered is not None:
            return "input_scale gives the scale that input_percentile would choose; remove one of them"
        if given is not None and self.fmt.pre_quant_scale:
            return (
                "its input_scale is given, and the pre_quant_scale that its input takes first is yet to be chosen; "
                "take pre_quant_scale out of the format, or calibrate and leave the given scale out"
            )
        why = fraction_problem(covered) if given is None else scale_problem(given)
        return None if why is None else f"{name} {why}"

    # ---- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self, nbytes: int) -> dict[str, Any]:
        """As JSON data without its key; `nbytes`: the size of its outputs, for readers."""
        entry = {
            name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None) and name != "key"
        }
        return {**entry, "shape": list(self.shape), "bytes": [self.bytes_before, nbytes]}

    @classmethod
    def from_json(cls, key: str, entry: Any) -> TensorPlan:
        """The inverse of `to_json`. Raises `PlanError`."""
        place = f"tensor {key!r}"
        if not isinstance(entry, dict):
            raise PlanError(f"{place}: must be an object")
        known = {item.name for item in dataclasses.fields(cls)} - {"key"}
        known_fields(entry, known | {"bytes"}, place)
        shape = entry.get("shape")
        are_sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not isinstance(shape, list) or not are_sizes or math.prod(size or 1 for size in shape) > _MAX_NUMEL:
            raise PlanError(f"{place}: shape is {shape!r}, expected a list of sizes as `lowbit plan` wrote it")
        numbers: dict[str, Any] = {name: entry.get(name) for name in _NUMBERS}  # looked at by `validate`
        texts = {name: entry.get(name, "") for name in known - {"shape", *_NUMBERS}}
        if wrong := next((name for name, value in texts.items() if not isinstance(value, str)), None):
            raise PlanError(f"{place}: {wrong} is {texts[wrong]!r}, expected text")
        return cls(key=key, shape=tuple(shape), **texts, **numbers)


def known_fields(entry: Mapping[str, Any], known: set[str], place: str) -> None:
    """Raise `PlanError` for a field that is not known."""
    if unknown := sorted(set(entry) - known):
        raise PlanError(f"{place}: has no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
