"""Weights to test with, and measures that tests assert on."""

from tests.support.assertions import assert_sqnr_within, sqnr
from tests.support.poison import INTEGER_POISON, POISON_BYTE, poison, poisoned_empty
from tests.support.tensors import gaussian, outlier_weight, widened

__all__ = [
    "INTEGER_POISON",
    "POISON_BYTE",
    "assert_sqnr_within",
    "gaussian",
    "outlier_weight",
    "poison",
    "poisoned_empty",
    "sqnr",
    "widened",
]
