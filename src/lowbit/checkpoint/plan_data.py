"""The plan: what becomes of every tensor, and why. Data only; it can be written, edited and run.

>>> from lowbit.checkpoint.plan_data import TensorPlan
>>> TensorPlan("a.weight", "keep", "1-D", (8,), "bfloat16").bytes_before
16
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, PlanError, WriteError
from lowbit.formats.base import Format
from lowbit.formats.registry import parse_spec
from lowbit.solvers import Pipeline, misfit, parse_pipeline

from .dialects.base import Dialect, StoredLayer, TensorSpec, get_dialect, join_key, layer_of
from .eligibility import cannot_hold, cannot_store, dtype_name
from .safetensors_header import DTYPES
from .source import Component, Source
from .stored_format import StoredFormat
from .strict_json import parse_object

ACTIONS = ("quantize", "keep", "drop")
_VERSION = 1
_DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor. `shape` and `dtype` are those of the source; a quantized source's are logical.

    `action`: "quantize" stores it in `format` (a spec, with "@" and a layout behind it or without) with codes chosen by
    `solver`; "keep" copies it; "drop" leaves it out. `why` is for readers. `was`: the format in which the source stores
    it, when it is quantized already. `name`: the layer, where the key does not tell (another tool's codes).
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
        shape = (self.shape[0], self.shape[1])
        return StoredLayer(self.layer, self.fmt, shape, self.spec.dtype, layout=self.stored.layout)

    @property
    def pipeline(self) -> Pipeline:
        """The solver as it is run. Raises `SolverError` for a wrong name."""
        return parse_pipeline(self.solver)

    @property
    def bytes_before(self) -> int:
        """Its size in the source, in bytes."""
        if self.was:
            return parse_spec(self.was).nbytes(self.shape[0], self.shape[1], self.spec.dtype)
        return self.spec.nbytes


@dataclass(frozen=True)
class ComponentPlan:
    """The plan of one model in the source: its name ("" for the only one), the preset in force and every tensor."""

    name: str
    tensors: tuple[TensorPlan, ...]
    preset: str = ""
    preset_why: str = ""

    def outputs(self, dialect: Dialect) -> dict[str, dict[str, TensorSpec]]:
        """Key of a source tensor -> the tensors that are made of it.

        Raises `PlanError` when two of them would have one name.
        """
        made = {tensor.key: _made_of(tensor, dialect) for tensor in self.tensors}
        biases = {join_key(t.layer, "bias"): t for t in self.tensors if t.action == "quantize" and t.fmt.folds_bias}
        for key, tensor in biases.items():
            if key not in made:  # the format moves a constant into the bias, so there has to be one
                made[tensor.key][key] = TensorSpec(tensor.spec.dtype, tensor.shape[:1])
        owner: dict[str, str] = {}
        for source_key, specs in made.items():
            for key in specs:
                if key in owner:
                    raise PlanError(
                        f"{self.name or 'plan'}: two output tensors would be named {key!r}, made of {owner[key]!r} and "
                        f"{source_key!r}; keep one of these layers or rename it in the source"
                    )
                owner[key] = source_key
        return made


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint. `source`: its path, for readers. `dialect`: how quantized layers are written."""

    components: tuple[ComponentPlan, ...]
    dialect: str = "comfy"
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def tensors(self) -> Iterator[TensorPlan]:
        """Every tensor of every component."""
        for component in self.components:
            yield from component.tensors

    def count(self, action: str) -> int:
        """How many tensors have this action."""
        return sum(tensor.action == action for tensor in self.tensors())

    @cached_property
    def bytes_before(self) -> int:
        """Size of all source tensors, in bytes."""
        return sum(tensor.bytes_before for tensor in self.tensors())

    @cached_property
    def bytes_after(self) -> int:
        """Size of all output tensors, in bytes."""
        return sum(sum(sizes.values()) for sizes in self.sizes_after.values())

    @cached_property
    def sizes_after(self) -> dict[str, dict[str, int]]:
        """Component name -> key of a source tensor -> bytes of all that is made of it."""
        dialect = get_dialect(self.dialect)
        return {
            component.name: {
                key: sum(spec.nbytes for spec in specs.values()) for key, specs in component.outputs(dialect).items()
            }
            for component in self.components
        }

    def component(self, name: str) -> ComponentPlan:
        """The plan of a component. Raises `PlanError` when there is none."""
        for component in self.components:
            if component.name == name:
                return component
        raise PlanError(f"the plan has no component {name!r}; make it anew from this source")

    # ---- checks -----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise `PlanError` for anything in the plan that cannot be done, whatever the source."""
        get_dialect(self.dialect)
        for component in self.components:
            seen: set[str] = set()
            for tensor in component.tensors:
                if tensor.key in seen:
                    raise PlanError(f"plan: tensor {tensor.key!r} stands in it twice; remove one entry")
                seen.add(tensor.key)
                _validate(tensor)
        self.sizes_after  # noqa: B018  (raises for two outputs of one name)

    def check_against(self, source: Source) -> None:
        """Raise `PlanError` unless this plan is about exactly the tensors of that source."""
        mine, theirs = {c.name for c in self.components}, {c.name for c in source.components}
        if mine != theirs:
            raise PlanError(
                f"the plan is about the models {sorted(mine)}, {source.place} holds {sorted(theirs)}; plan anew"
            )
        for component in self.components:
            _check_component(component, source.component(component.name), source)

    # ---- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As JSON data; `from_json` reads it back. Sizes are for readers: they are computed anew at reading."""
        return {
            "lowbit_plan": _VERSION,
            "source": self.source,
            "dialect": self.dialect,
            "notes": list(self.notes),
            "components": {c.name: _component_to_json(c, self.sizes_after[c.name]) for c in self.components},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "plan") -> Plan:
        """Read and validate. Raises `PlanError`, naming `where` and the tensor, for anything wrong in it."""
        if data.get("lowbit_plan") != _VERSION:
            raise PlanError(f"{where}: is no lowbit plan of version {_VERSION}; write one with `lowbit plan`")
        _known_fields(data, {"lowbit_plan", "source", "dialect", "notes", "components"}, where)
        components, notes = data.get("components"), data.get("notes", [])
        if not isinstance(components, dict) or not isinstance(notes, list):
            raise PlanError(f"{where}: 'components' must be an object by name and 'notes' a list")
        try:
            plan = cls(
                tuple(_component_from_json(name, entry, where) for name, entry in components.items()),
                str(data.get("dialect", "comfy")),
                str(data.get("source", "")),
                tuple(str(note) for note in notes),
            )
            plan.validate()
        except PlanError as error:
            raise PlanError(f"{where}: {str(error).removeprefix('plan: ')}") from error
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file, one line a tensor, to be read and edited. Raises `WriteError` if it cannot."""
        try:
            Path(path).write_text(_dump(self.to_json()), encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{path}: the plan cannot be written: {error.strerror}; check the path") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises `PlanError` for a file that is missing, no JSON, or wrong in any entry."""
        try:
            data = parse_object(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: the plan cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise PlanError(f"{path}: {error}; correct the plan file") from error
        return cls.from_json(data, str(path))


def _made_of(tensor: TensorPlan, dialect: Dialect) -> dict[str, TensorSpec]:
    """The output tensors of one source tensor by name."""
    if tensor.action == "drop":
        return {}
    if tensor.action == "keep":
        return {tensor.key: tensor.spec}
    if why := dialect.refuses(tensor.stored_layer):
        raise PlanError(
            f"layer {tensor.layer!r} as {tensor.format}: {why}; keep this layer, or choose another format or dialect"
        )
    return dialect.stored_specs(tensor.stored_layer)


def _validate(tensor: TensorPlan) -> None:
    place = f"plan: tensor {tensor.key!r}"
    if tensor.action not in ACTIONS:
        raise PlanError(f"{place}: action is {tensor.action!r}, expected one of {', '.join(ACTIONS)}")
    if tensor.dtype not in _DTYPE_OF:
        raise PlanError(f"{place}: dtype {tensor.dtype!r} is unknown; leave it as `lowbit plan` wrote it")
    if tensor.action != "quantize":
        return
    try:
        fmt = tensor.fmt
        misfits = misfit(tensor.pipeline, fmt)
    except LowbitError as error:
        raise PlanError(f"{place}: {error}") from error
    if misfits:
        raise PlanError(f"{place}: {fmt} {misfits}")
    why = cannot_hold(join_key(tensor.layer, "weight") if tensor.name else tensor.key, tensor.spec)
    why = why or cannot_store(tensor.stored, tensor.shape, embedding=False)
    if why:
        raise PlanError(f"{place} cannot become {fmt}: {list(tensor.shape)} {why}; set its action to keep")


def _check_component(plan: ComponentPlan, component: Component, source: Source) -> None:
    planned = {tensor.key: tensor for tensor in plan.tensors}
    if strange := next((key for key in planned if key not in component.tensors), None):
        raise PlanError(f"the plan names tensor {strange!r}, which {source.place} does not have; plan anew")
    if missing := next((key for key in component.tensors if key not in planned), None):
        raise PlanError(f"the plan says nothing about tensor {missing!r} of {source.place}; plan anew")
    for key, tensor in planned.items():
        info = component.tensors[key]
        if not tensor.was and (info.shape, dtype_name(info.dtype)) != (tensor.shape, tensor.dtype):
            raise PlanError(
                f"the plan has tensor {key!r} as {tensor.dtype} {list(tensor.shape)}, {info.path} as "
                f"{dtype_name(info.dtype)} {list(info.shape)}; it is about another checkpoint, plan anew"
            )


def _component_to_json(component: ComponentPlan, sizes: Mapping[str, int]) -> dict[str, Any]:
    tensors = {}
    for tensor in component.tensors:
        entry = {name: value for name, value in dataclasses.asdict(tensor).items() if value != "" and name != "key"}
        entry["shape"] = list(tensor.shape)
        tensors[tensor.key] = {**entry, "bytes": [tensor.bytes_before, sizes[tensor.key]]}
    return {"preset": component.preset, "preset_why": component.preset_why, "tensors": tensors}


def _component_from_json(name: str, entry: Any, where: str) -> ComponentPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("tensors"), dict):
        raise PlanError(f"component {name!r} must be an object with 'tensors' by key")
    _known_fields(entry, {"preset", "preset_why", "tensors"}, f"component {name!r}")
    tensors = tuple(_tensor_from_json(key, fields) for key, fields in entry["tensors"].items())
    return ComponentPlan(name, tensors, str(entry.get("preset", "")), str(entry.get("preset_why", "")))


def _tensor_from_json(key: str, entry: Any) -> TensorPlan:
    place = f"tensor {key!r}"
    if not isinstance(entry, dict):
        raise PlanError(f"{place}: must be an object")
    known = {item.name for item in dataclasses.fields(TensorPlan)} - {"key"}
    _known_fields(entry, known | {"bytes"}, place)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise PlanError(f"{place}: shape is {shape!r}, expected a list of sizes as `lowbit plan` wrote it")
    texts = {name: entry.get(name, "") for name in known - {"shape"}}
    if wrong := next((name for name, value in texts.items() if not isinstance(value, str)), None):
        raise PlanError(f"{place}: {wrong} is {texts[wrong]!r}, expected text")
    return TensorPlan(key=key, shape=tuple(shape), **texts)


def _known_fields(entry: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(set(entry) - known):
        raise PlanError(f"{place}: has no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")


def _dump(data: dict[str, Any]) -> str:
    """JSON with one line a tensor."""
    lines = []
    for name, component in data["components"].items():
        rows = [f"      {json.dumps(key)}: {json.dumps(entry)}" for key, entry in component["tensors"].items()]
        head = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in component.items() if k != "tensors")
        lines.append(f'    {json.dumps(name)}: {{{head}, "tensors": {{\n' + ",\n".join(rows) + "\n    }}")
    head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in data.items() if k != "components")
    return "{\n" + head + '  "components": {\n' + ",\n".join(lines) + "\n  }\n}\n"
