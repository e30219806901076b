"""The plan of a checkpoint: that of every tensor, by model. Data only; it can be written, edited and run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.errors import PlanError
from lowbit.text_files import write_text

from .dialects.base import Dialect, TensorSpec, get_dialect, join_key
from .eligibility import dtype_name
from .fold_data import Fold, check_folds, folds_from_json
from .shared_low_rank import check_groups
from .source import Component, Source
from .strict_json import parse_object
from .tensor_plan import TensorPlan, known_fields

__all__ = ["ComponentPlan", "Plan", "TensorPlan"]
_VERSION = 1


@dataclass(frozen=True)
class ComponentPlan:
    """The plan of one model in the source: its name ("" for the only one), the preset in force and every tensor.

    `folds`: the norms and linears that a scale is folded into, and those that were looked at and left alone.
    """

    name: str
    tensors: tuple[TensorPlan, ...]
    preset: str = ""
    preset_why: str = ""
    folds: tuple[Fold, ...] = ()

    def outputs(self, dialect: Dialect) -> dict[str, dict[str, TensorSpec]]:
        """Key of a source tensor -> the tensors that are made of it.

        Raises `PlanError` when two of them would have one name.
        """
        made = {tensor.key: tensor.outputs(dialect) for tensor in self.tensors}
        biases = {join_key(t.layer, "bias"): t for t in self.tensors if t.action == "quantize" and t.fmt.folds_bias}
        for key, tensor in biases.items():
            if key not in made:  # the format moves a constant into the bias, so there has to be one
                made[tensor.key][key] = TensorSpec(tensor.spec.dtype, tensor.weight.matrix[:1])
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
                tensor.validate()
            check_folds(component.folds, component.tensors)
            check_groups(component.tensors)
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
        known_fields(data, {"lowbit_plan", "source", "dialect", "notes", "components"}, where)
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
        write_text(path, _dump(self.to_json()), "the plan")

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
    tensors = {tensor.key: tensor.to_json(sizes[tensor.key]) for tensor in component.tensors}
    folds = {"folds": [fold.to_json() for fold in component.folds]} if component.folds else {}
    return {"preset": component.preset, "preset_why": component.preset_why, **folds, "tensors": tensors}


def _component_from_json(name: str, entry: Any, where: str) -> ComponentPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("tensors"), dict):
        raise PlanError(f"component {name!r} must be an object with 'tensors' by key")
    known_fields(entry, {"preset", "preset_why", "folds", "tensors"}, f"component {name!r}")
    tensors = tuple(TensorPlan.from_json(key, fields) for key, fields in entry["tensors"].items())
    folds = folds_from_json(entry)
    return ComponentPlan(name, tensors, str(entry.get("preset", "")), str(entry.get("preset_why", "")), folds)


def _dump(data: dict[str, Any]) -> str:
    """JSON with one line a tensor, and one a fold."""
    lines = []
    for name, component in data["components"].items():
        rows = [f"      {json.dumps(key)}: {json.dumps(entry)}" for key, entry in component["tensors"].items()]
        plain = ((k, v) for k, v in component.items() if k not in ("tensors", "folds"))
        head = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in plain)
        folds = ",\n".join(f"      {json.dumps(fold)}" for fold in component.get("folds", ()))
        head += f', "folds": [\n{folds}\n    ]' if folds else ""
        lines.append(f'    {json.dumps(name)}: {{{head}, "tensors": {{\n' + ",\n".join(rows) + "\n    }}")
    head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in data.items() if k != "components")
    return "{\n" + head + '  "components": {\n' + ",\n".join(lines) + "\n  }\n}\n"
