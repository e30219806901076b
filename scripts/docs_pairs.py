"""Every dialect with every format, as tests/checkpoint/dialects/test_every_pair.py proves it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType

import lowbit
from lowbit.checkpoint import dialects as package
from lowbit.checkpoint.dialects import Dialect, StoredLayer, dialects
from lowbit.formats import formats

SHAPE = (128, 1024)  # that of the test
# What is read of dialects that are not written: nothing in a registry says it.
_BFL = ("fp8_e4m3", "nvfp4")
READ = {
    "bfl": _BFL,
    "bfl_swapped": _BFL,
    "executorch": ("fp8_e4m3", "fp8_e5m2", "int8", "mxfp4", "mxfp8", "nvfp4", "wna16"),
    "gguf": ("gguf",),
}
TESTED, READ_ONLY, NOT_HELD = "tested", "read only", "no"


def specs() -> list[str]:
    """The specs of all formats with a golden number, and each format with both optional parts; all are in the test."""
    found = []
    for name, cls in formats().items():
        found += [*cls.golden_sqnr, f"{name}(pre_quant_scale=true,input_scale=true)"]
    return found


def modules_of(dialect: Dialect) -> list[ModuleType]:
    """The module that a dialect is written in, and those beside it that carry its name in front."""
    own = sys.modules[type(dialect).__module__]
    prefix = own.__name__.rpartition(".")[2] + "_"
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name.startswith(prefix)]
    return [own, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]


def is_read(dialect: Dialect, name: str) -> bool:
    """Whether a dialect that is only read has the format."""
    if dialect.name not in READ:
        sys.exit(f"scripts/docs_pairs.py: say in READ which formats are read from files of {dialect.name}")
    return name in READ[dialect.name]


def verdict(dialect: Dialect, spec: str) -> tuple[str, str]:
    """TESTED, READ_ONLY or NOT_HELD, and for the last the reason."""
    fmt = lowbit.parse_spec(spec)
    if not dialect.writes:
        return (READ_ONLY, "") if is_read(dialect, fmt.name) else (NOT_HELD, "")
    why = dialect.refuses(StoredLayer("blocks.0.proj", fmt, SHAPE))
    return (NOT_HELD, why) if why else (TESTED, "")


def grouped(dialect: Dialect, wanted: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The specs that a dialect has, and those that it has not by the reason."""
    held, refused = [], {}
    for spec in wanted:
        found, why = verdict(dialect, spec)
        if found == NOT_HELD:
            refused.setdefault(why, []).append(spec)
        else:
            held.append(spec)
    return held, refused


def every_dialect() -> list[Dialect]:
    """All dialects, those that are written first."""
    return sorted(dialects().values(), key=lambda dialect: (not dialect.writes, dialect.name))


def by_format(found: Iterable[str]) -> dict[str, list[str]]:
    """Format -> its specs among these."""
    grouped_specs: dict[str, list[str]] = {}
    for spec in found:
        grouped_specs.setdefault(spec.partition("(")[0], []).append(spec)
    return grouped_specs
