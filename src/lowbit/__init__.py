"""lowbit: convert model weights from 16 bits to 8 and 4, prove what was lost, load them and multiply with them."""

from lowbit import ops, tensor_ops
from lowbit.calibration import calibrate
from lowbit.checkpoint.load import load
from lowbit.checkpoint.save import save
from lowbit.dispatch import use_backend
from lowbit.errors import LowbitError
from lowbit.experts import QuantizedBank, grouped_linear, quantize_bank
from lowbit.formats import Format, parse_spec
from lowbit.nn import quantize_, repack_
from lowbit.tensor import QuantizedTensor, fallbacks

__version__ = "0.1.0"

__all__ = [
    "Format",
    "LowbitError",
    "QuantizedBank",
    "QuantizedTensor",
    "calibrate",
    "fallbacks",
    "grouped_linear",
    "load",
    "ops",
    "parse_spec",
    "quantize_",
    "quantize_bank",
    "repack_",
    "save",
    "tensor_ops",
    "use_backend",
]
