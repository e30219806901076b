"""What a format stores of a weight, as its fields and part rules say it: names, shapes, bytes, spec and JSON."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit import memory
from lowbit.formats.parts import FLOATS, HALVES, K, Part, Parts, check_parts
from lowbit.numerics.groups import row_chunks


@dataclass(frozen=True)
class Stored(ABC):
    """The part of `Format` that computes no values. A subclass states its name, its fields and `part_rules`."""

    pre_quant_scale: bool = False
    """The input is multiplied by a stored vector [K] before the layer (activation-aware scaling)."""
    input_scale: bool = False
    """A static activation scale is stored with the weight; kept for runtimes that use one."""

    name: ClassVar[str] = ""

    @abstractmethod
    def part_rules(self) -> tuple[Part, ...]:
        """The rules of the parts this format itself stores, `qdata` first."""

    @cached_property
    def rules(self) -> tuple[Part, ...]:
        """The rules of all stored parts, the optional ones last."""
        extra = [Part("pre_quant_scale", (K,), FLOATS)] if self.pre_quant_scale else []
        extra += [Part("input_scale", (), (torch.float32,))] if self.input_scale else []
        return (*self.part_rules(), *extra)

    @cached_property
    def param_rules(self) -> tuple[Part, ...]:
        """The rules of this format's own parts without `qdata`."""
        return tuple(rule for rule in self.part_rules() if rule.name != "qdata")

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, in the order in which ops take them."""
        return tuple(rule.name for rule in self.rules)

    @cached_property
    def row_multiple(self) -> int:
        """Rows can be cut at multiples of this."""
        return max((rule.rows_per_entry for rule in self.rules), default=1)

    def sizes(self, n: int, k: int) -> dict[str, int]:
        """N, K and, where there is one, R, for the part rules."""
        return {"N": n, "K": k}

    def rows_of(self, parts: Mapping[str, Tensor]) -> int:
        """N of a set of parts."""
        return parts["qdata"].shape[0]

    def row_ranges(self, n: int, k: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows to work on at a time: small, and cut where this format allows it."""
        return row_chunks(n, k, self.row_multiple)

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shape of every part of a weight [n, k]."""
        return {rule.name: rule.shape(self.sizes(n, k)) for rule in self.rules}

    def part_dtypes(self, source: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of every part that `quantize` makes of a weight of dtype `source`.

        Where a rule allows several, a 16-bit source keeps its own and a wider one gets bfloat16: a scale rounded to 8
        bits costs nothing beside 4-bit codes that are chosen for it, and float32 factors may outweigh the codes.
        """
        half = source if source in HALVES else torch.bfloat16
        return {r.name: half if half in r.dtypes else r.dtypes[0] for r in self.rules}

    def nbytes(self, n: int, k: int, source: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a weight [n, k] takes in this format."""
        dtypes, total = self.part_dtypes(source), 0
        for name, shape in self.part_shapes(n, k).items():
            total += dtypes[name].itemsize * torch.Size(shape).numel()
        return total

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str = "weight") -> None:
        """Raise `PartsError`, naming `where`, unless these are the parts of a weight of this shape."""
        check_parts(self.rules, parts, self.sizes(*shape), where)

    def empty_parts(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Parts:
        """Uninitialised parts for a weight [N, K]."""
        shapes, dtypes = self.part_shapes(*shape), self.part_dtypes(dtype)
        if device.type == "cpu":
            return {name: memory.empty(shapes[name], dtypes[name]) for name in self.part_names}
        return {name: torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in self.part_names}

    def store_rows(self, out: Parts, piece: Parts, shape: tuple[int, ...], start: int) -> None:
        """Write the parts of some rows into those of the whole weight, allocating these at the first piece."""
        sizes = self.sizes(*shape)
        for rule in (rule for rule in self.rules if rule.name in piece):
            tensor, axis = piece[rule.name], rule.row_axis
            whole = rule.shape(sizes)
            if axis is None or tuple(tensor.shape) == whole:
                out[rule.name] = tensor.contiguous()
                continue
            if rule.name not in out:
                out[rule.name] = torch.empty(whole, dtype=tensor.dtype, device=tensor.device)
            out[rule.name].narrow(axis, start // rule.rows_per_entry, tensor.shape[axis]).copy_(tensor)

    # ---- spec and JSON ----------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The fields as JSON values, the name under "format"; `from_config` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    @cached_property
    def spec(self) -> str:
        """The spec string: the name, and in parentheses the fields that differ from their defaults."""
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def __str__(self) -> str:
        return self.spec
