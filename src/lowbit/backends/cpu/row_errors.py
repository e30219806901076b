"""row_errors for the formats whose rows decode without a search, decoded and compared in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import coded_rows, native
from lowbit.backends.cpu.operands import DTYPES
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.convrot_w4a4 import ConvrotW4A4
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts


def refuses(fmt: Format, parts: Parts, w: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if w.dtype not in DTYPES:
        return f"the weight is {str(w.dtype).removeprefix('torch.')}; the kernel takes float32, bfloat16 and float16"
    if isinstance(fmt, Int8 | ConvrotW4A4) and fmt.rotation:
        return "its rotation would be undone in another order of sums than the reference's"
    return coded_rows.refuses(fmt, torch.float32)


def row_errors(fmt: Format, parts: Parts, w: Tensor) -> Tensor:
    """parts, w [N, K] -> float32 [3, N]: the sums of squares of w, of the difference and of what the parts mean."""
    source = w.detach().contiguous()
    coded = coded_rows.describe(fmt, parts, source.shape[1], packed=False)
    sums = torch.empty((3, source.shape[0]), dtype=torch.float32, device="cpu")
    native.module().row_errors(
        coded.address, source.data_ptr(), DTYPES[source.dtype], sums.data_ptr(), native.threads()
    )
    return sums


for _name in coded_rows.DECODED:
    kernel("row_errors", format=_name, backend="cpu", refuses=refuses, tolerance=1e-5)(row_errors)
