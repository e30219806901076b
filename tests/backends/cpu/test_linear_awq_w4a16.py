from __future__ import annotations

import pytest

from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [8, 24, 32, 64, 160])
def test_product(group, dtype):
    """The product equals that of the dequantized weight for every group size, odd numbers of rows and of tokens."""
    for n in ROWS:
        check_linear(f"awq_w4a16(group_size={group})", n, 3 * group if group % 64 else 192, 3, dtype)
    for m in TOKENS:
        check_linear(f"awq_w4a16(group_size={group})", 35, 2 * group, m, dtype, bias=m % 2 == 0)


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties("awq_w4a16", 100, 512)
    check_properties("awq_w4a16(group_size=32)", 16, 32)
