"""The formats by name, and the two written forms of a format: its spec string and its JSON config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from lowbit.errors import FormatError, UnknownFormatError
from lowbit.formats.base import Format

_REGISTRY: dict[str, type[Format]] = {}
_SPEC = re.compile(r"^\s*([A-Za-z0-9_]+)\s*(?:\((.*)\))?\s*$", re.DOTALL)
F_ = TypeVar("F_", bound="type[Format]")


def register(cls: F_) -> F_:
    """Class decorator: make the format known by its name. A second format of that name is refused."""
    if cls.name in _REGISTRY:
        raise FormatError(f"a format named {cls.name!r} is registered already ({_REGISTRY[cls.name].__module__})")
    _REGISTRY[cls.name] = cls
    return cls


def formats() -> dict[str, type[Format]]:
    """Every registered format by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def get_format(name: str, where: str = "") -> type[Format]:
    """The format class of that name; `UnknownFormatError` (a KeyError and a ValueError) lists the known ones."""
    if name not in _REGISTRY:
        raise UnknownFormatError(name, _REGISTRY, where)
    return _REGISTRY[name]


def from_config(config: Mapping[str, Any], where: str = "") -> Format:
    """The format of a JSON config made by `Format.config`. Unknown fields and bad values raise `FormatError`."""
    fields = dict(config)
    cls = get_format(str(fields.pop("format", "")), where)
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        place = f" in {where}" if where else ""
        raise FormatError(f"{cls.name}{place} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return cls(**values)


@lru_cache(maxsize=4096)
def parse_spec(spec: str) -> Format:
    """The format that a spec string names, such as `int8(granularity=block,block_size=128x128)`."""
    if "@" in spec:
        raise FormatError(
            f"{spec!r}: what stands behind @ is the arrangement in a file or for a kernel, not part of the format; "
            "name it to `lowbit convert`, or use QuantizedTensor.in_layout"
        )
    return from_config(spec_config(spec))


def spec_config(spec: str) -> dict[str, Any]:
    """The format's name, as `format`, and the options that a spec string gives. Raises `FormatError`."""
    match = _SPEC.match(spec)
    if not match:
        raise FormatError(f"{spec!r} is not a format spec; write it like fp8_e4m3(granularity=row)")
    config: dict[str, Any] = {"format": match[1]}
    for item in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise FormatError(f"{spec!r}: write {item!r} as field=value")
        config[key.strip()] = _parse_value(value.strip())
    return config


def as_format(spec: Format | str) -> Format:
    """A format given as itself or as its spec string."""
    return spec if isinstance(spec, Format) else parse_spec(spec)


def one_of(fmt: Format, field: str, allowed: Sequence[object]) -> None:
    """Raise `FormatError` unless the field's value is one of `allowed`."""
    value = getattr(fmt, field)
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise FormatError(f"{fmt.name}: {field} is {value!r}, expected one of {', '.join(map(str, allowed))}")


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(int(piece) for piece in text.split("x"))
    return text.strip("'\"")
