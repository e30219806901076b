"""What a QuantizedTensor does without being dequantized: one handler an operation, on the parts."""

from lowbit.tensor_ops import collectives, copies, products, rows

__all__ = ["collectives", "copies", "products", "rows"]
