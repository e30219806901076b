"""Mixture-of-experts banks: [E, N, K] weights in few bits, and the linear that sends each token to its expert."""

from lowbit.experts import bank_ops
from lowbit.experts.bank import QuantizedBank, rebuild_quantized_bank
from lowbit.experts.quantize import grouped_linear, quantize_bank

__all__ = ["QuantizedBank", "bank_ops", "grouped_linear", "quantize_bank", "rebuild_quantized_bank"]
