"""Make a bank of experts from a plain 3-D weight, and multiply tokens with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError, WeightError
from lowbit.experts.bank import QuantizedBank
from lowbit.experts.bank_ops import check_columns
from lowbit.formats.base import Format
from lowbit.formats.registry import as_format
from lowbit.ops import grouped
from lowbit.solvers import AUTO, solve
from lowbit.solvers.base import Statistics
from lowbit.tensor import QuantizedTensor
from lowbit.tensor_ops.products import autocast_input


def quantize_bank(
    weight: Tensor,
    fmt: Format | str,
    *,
    transposed: bool = False,
    solver: str = AUTO,
    statistics: Sequence[Statistics | None] | None = None,
    where: str = "bank",
) -> QuantizedBank:
    """Quantize the weights of E experts, each for itself, into one bank of the same shape and dtype.

    weight: float [E, N, K], or with `transposed` [E, K, N] (experts multiplied as `x @ w`). `solver` and `statistics`
    (one an expert) as in `quantize_`. Put it into a module as a frozen parameter:
    `experts.down_proj = nn.Parameter(quantize_bank(experts.down_proj, "nvfp4"), requires_grad=False)`.

    Raises `WeightError`, naming `where` and the expert, for a weight that the format cannot hold.

    >>> import torch
    >>> from lowbit.experts import grouped_linear, quantize_bank
    >>> bank = quantize_bank(torch.randn(4, 32, 64), "nvfp4")
    >>> bank[2].shape, grouped_linear(torch.randn(3, 64), bank, expert_of_token=torch.tensor([2, 0, 2])).shape
    (torch.Size([32, 64]), torch.Size([3, 32]))
    """
    fmt = as_format(fmt)
    if weight.dim() != 3 or not weight.shape[0]:
        raise WeightError(f"{where}: has shape {list(weight.shape)}, expected experts, rows and columns: [E, N, K]")
    if weight.is_meta:
        raise WeightError(f"{where}: is on the meta device, without values; load a checkpoint into the module first")
    if fmt.folds_bias:
        raise WeightError(f"{where}: {fmt} corrects the bias of its layer, which a bank has not; choose another format")
    if statistics is not None and len(statistics) != weight.shape[0]:
        raise WeightError(f"{where}: {len(statistics)} statistics for {weight.shape[0]} experts; give one an expert")
    matrices = weight.detach().transpose(-1, -2) if transposed else weight.detach()
    shape = (int(matrices.shape[1]), int(matrices.shape[2]))
    experts = []
    for index, matrix in enumerate(matrices):
        known = None if statistics is None else statistics[index]
        parts = solve(matrix, fmt, solver, known, where=f"{where}[{index}]").parts
        experts.append(QuantizedTensor(parts, fmt, shape, weight.dtype))
    return QuantizedBank.stack(experts, transposed=transposed)


def grouped_linear(
    x: Tensor,
    bank: QuantizedBank,
    *,
    offsets: Tensor | None = None,
    expert_of_token: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Each token times the weight of its expert, plus that expert's bias: x [T, K] -> [T, N] in the dtype of x.

    Either `offsets`, int32 [E]: x is sorted by expert, and these are the ends of their rows; or `expert_of_token`,
    int [...], for x [..., K] in any order. `bias`: [E, N]. Rows of no expert (past the last offset, or a number outside
    0 to E - 1) become zeros. Gradients reach x and `bias`. Raises `UnsupportedError`.
    """
    if (offsets is None) == (expert_of_token is None):
        raise UnsupportedError("grouped_linear takes either offsets or expert_of_token; pass one of them")
    check_columns(x, bank.matrix[1], bank)
    if bias is not None and tuple(bias.shape) != (bank.shape[0], bank.matrix[0]):
        wanted = [bank.shape[0], bank.matrix[0]]
        raise UnsupportedError(f"the bias of {bank!r} must be [E, N] = {wanted}, not {list(bias.shape)}")
    x = autocast_input(x)
    bias = None if bias is None else bias.to(x.dtype)
    if expert_of_token is None:
        return grouped.grouped_linear(x, bank.part_list, offsets, bias, bank.spec)
    return _by_token(x, bank, expert_of_token, bias)


def _by_token(x: Tensor, bank: QuantizedBank, expert_of_token: Tensor, bias: Tensor | None) -> Tensor:
    if expert_of_token.shape != x.shape[:-1] or expert_of_token.is_floating_point():
        raise UnsupportedError(
            f"expert_of_token must hold one whole number a token, {list(x.shape[:-1])}, not "
            f"{str(expert_of_token.dtype).removeprefix('torch.')} {list(expert_of_token.shape)}"
        )
    experts = bank.shape[0]
    numbers = expert_of_token.reshape(-1).long()
    numbers = torch.where(numbers < 0, experts, numbers)  # nobody's rows come last
    sorted_numbers, order = numbers.sort(stable=True)
    ends = torch.searchsorted(sorted_numbers, torch.arange(experts, device=x.device), right=True)
    rows = x.reshape(numbers.shape[0], x.shape[-1])[order]
    out = grouped.grouped_linear(rows, bank.part_list, ends, bias, bank.spec)
    return out[order.argsort()].reshape(*x.shape[:-1], bank.matrix[0])
