"""Measures of quality and the HTML pages that show them. A page is one file: no network, light and dark.

Only the page of `lowbit compare` has a script, to sort and filter its table; without one it still shows everything.
"""

from lowbit.report.comparison import ComparisonPage, Variant, write_comparison
from lowbit.report.conversion import ConversionPage, KeptGroup, LayerRow, write_conversion
from lowbit.report.metrics import Agreement, compare_embeddings

__all__ = [
    "Agreement",
    "ComparisonPage",
    "ConversionPage",
    "KeptGroup",
    "LayerRow",
    "Variant",
    "compare_embeddings",
    "write_comparison",
    "write_conversion",
]
