from __future__ import annotations

import pytest

from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

ZEROS = pytest.mark.parametrize("zeros", [False, True])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ZEROS
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_and_groups(bits, zeros, dtype):
    """The product equals that of the dequantized weight for groups of every size and odd numbers of rows."""
    for group, n in zip((0, 8, 24, 32, 64, 160), ROWS, strict=True):
        check_linear(f"wna16(bits={bits},group_size={group},zero_point={zeros})", n, 3 * group or 200, 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ZEROS
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens(bits, zeros, dtype):
    """The product equals that of the dequantized weight for odd numbers of tokens."""
    for m in TOKENS:
        check_linear(f"wna16(bits={bits},group_size=24,zero_point={zeros})", 35, 72, m, dtype, bias=m % 2 == 0)


def test_groups_of_a_word():
    """Eight-bit codes go four to a word, so that a group of four columns is multiplied, too."""
    for dtype in DTYPES:
        check_linear("wna16(bits=8,group_size=4)", 17, 12, 5, dtype)
        check_linear("wna16(bits=8,group_size=0)", 17, 12, 5, dtype)


@ZEROS
@pytest.mark.parametrize("bits", [4, 8])
def test_properties(bits, zeros):
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties(f"wna16(bits={bits},group_size=64,zero_point={zeros})", 100, 512)
    check_properties(f"wna16(bits={bits},group_size=0,zero_point={zeros})", 16, 32)
