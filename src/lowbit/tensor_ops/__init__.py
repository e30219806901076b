"""What a QuantizedTensor does without being dequantized: one handler an operation, on the parts."""

from lowbit.tensor_ops import collectives, convolutions, copies, products, rows, updates

__all__ = ["collectives", "convolutions", "copies", "products", "rows", "updates"]
