"""The `lowbit::` operators: generic ones over any format, and the ones that the field knows by name."""

from lowbit.ops.generic import dequantize, embedding, linear, quantize

__all__ = ["dequantize", "embedding", "linear", "quantize"]
