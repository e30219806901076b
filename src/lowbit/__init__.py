"""lowbit: convert model weights from 16 bits to 8 and 4, prove what was lost, load them and multiply with them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit.starting import end_at_interrupt

end_at_interrupt()

from lowbit import ops, tensor_ops
from lowbit.calibration import calibrate
from lowbit.checkpoint.load import load
from lowbit.checkpoint.save import save
from lowbit.checkpoint.source import open_source
from lowbit.dispatch import use_backend
from lowbit.errors import LowbitError
from lowbit.experts import QuantizedBank, grouped_linear, quantize_bank
from lowbit.formats import Format, parse_spec
from lowbit.nn import quantize_, repack_
from lowbit.tensor import QuantizedTensor, fallbacks

if TYPE_CHECKING:
    from lowbit.checkpoint.compare import compare
    from lowbit.checkpoint.convert import convert
    from lowbit.checkpoint.export_gguf import export_gguf
    from lowbit.checkpoint.migrate import migrate
    from lowbit.checkpoint.plan import make_plan
    from lowbit.checkpoint.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Format",
    "LowbitError",
    "QuantizedBank",
    "QuantizedTensor",
    "calibrate",
    "compare",
    "convert",
    "export_gguf",
    "fallbacks",
    "grouped_linear",
    "load",
    "make_plan",
    "migrate",
    "open_source",
    "ops",
    "parse_spec",
    "quantize_",
    "quantize_bank",
    "repack_",
    "save",
    "tensor_ops",
    "use_backend",
    "verify",
]

_CHECKPOINTS = {  # what works on files, by its module: imported when it is first asked for, so that the rest is quick
    "compare": "compare",
    "convert": "convert",
    "export_gguf": "export_gguf",
    "make_plan": "plan",
    "migrate": "migrate",
    "verify": "verify",
}


if not TYPE_CHECKING:  # a checker would take it for a module that has any name

    def __getattr__(name: str) -> Any:
        if name not in _CHECKPOINTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"lowbit.checkpoint.{_CHECKPOINTS[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
