"""What an adapter does to one weight W [N, K], by the method that it was trained with.

    LoRA    dW = scale * up down                          up [N, R], down [R, K]
    LoHa    dW = scale * (up1 down1) * (up2 down2)        the products element by element
    LoKr    dW = scale * kron(w1, w2)                     w1 [a, b], w2 [N / a, K / b]; each may be a product itself
    DoRA    W' = magnitude * (W + dW) / |W + dW|          norms of rows [N] or of input channels [I]; dW of any method

Sources: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2022 (FedPara, LoHa), Yeh et al. 2023 (LyCORIS, LoKr), Liu et al. 2024
(DoRA, section 4). LoHa and LoKr are low-rank changes too: of a rank that is the product of two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError


class Delta(ABC):
    """The change of one layer, times a strength; its tensors are of any float dtype, on any device."""

    kind: ClassVar[str]
    needs_weight: ClassVar[bool] = False
    """Whether the change depends on the weight, which `dense` then takes."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """R of its factors, as it was trained; 0 without any."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: [N, K], or a convolution's."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of, but `scale`."""

    scale: float
    """What the product is multiplied by."""

    @abstractmethod
    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """The change as a matrix: float32 [N, K]. weight: the matrix [N, K] that it `needs_weight` for."""

    def low_rank(self) -> LoraDelta | None:
        """The same change as a LoRA; None where it is none, or none that takes less than the change itself."""
        return None


@dataclass(frozen=True)
class LoraDelta(Delta):
    """`scale * up @ down`. down: [R, K], or [R, K, ...] of a convolution; up: [N, R]."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    kind: ClassVar[str] = "LoRA"

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or that of a convolution's kernel."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.down, self.up

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """float32 [N, K]."""
        down, up = self.down.to(device, torch.float32).flatten(1), self.up.to(device, torch.float32)
        return (up * (strength * self.scale)) @ down

    def low_rank(self) -> LoraDelta | None:
        """Itself."""
        return self


@dataclass(frozen=True)
class LohaDelta(Delta):
    """`scale * (first * second)`, two low-rank matrices multiplied element by element."""

    first: LoraDelta
    second: LoraDelta
    scale: float = 1.0

    kind: ClassVar[str] = "LoHa"

    @property
    def rank(self) -> int:
        """R of each; the change has up to its square."""
        return max(self.first.rank, self.second.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or that of a convolution's kernel."""
        return self.first.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All four factors."""
        return *self.first.tensors, *self.second.tensors

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """float32 [N, K]."""
        return self.first.dense(strength * self.scale, device).mul_(self.second.dense(device=device))

    def low_rank(self) -> LoraDelta | None:
        """Column pairs of the ups times row pairs of the downs: rank R * R."""
        if not _is_thin(self.first.rank * self.second.rank, self.shape):
            return None
        up = torch.einsum("ni,nj->nij", self.first.up.float(), self.second.up.float()).flatten(1)
        downs = [one.down.flatten(1).float() * one.scale for one in (self.first, self.second)]
        down = torch.einsum("ik,jk->ijk", *downs).flatten(0, 1)
        return LoraDelta(down.view(-1, *self.shape[1:]), up, self.scale)


@dataclass(frozen=True)
class LokrDelta(Delta):
    """`scale * kron(w1, w2)`. w1: [a, b]; w2: [c, d], or [c, d, ...] of a convolution; the weight: [a c, b d, ...]."""

    w1: Tensor | LoraDelta
    w2: Tensor | LoraDelta
    scale: float = 1.0

    kind: ClassVar[str] = "LoKr"

    @property
    def rank(self) -> int:
        """R of its factors; 0 where both are whole."""
        return max(part.rank if isinstance(part, LoraDelta) else 0 for part in (self.w1, self.w2))

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or that of a convolution's kernel."""
        (a, b), (c, d, *kernel) = self.w1.shape, self.w2.shape
        return a * c, b * d, *kernel

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors, or what these are products of."""
        return tuple(
            t for part in (self.w1, self.w2) for t in (part.tensors if isinstance(part, LoraDelta) else (part,))
        )

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """float32 [N, K]."""
        w1, w2 = (
            part.dense(device=device) if isinstance(part, LoraDelta) else part.to(device, torch.float32).flatten(1)
            for part in (self.w1, self.w2)
        )
        return torch.kron(w1 * (strength * self.scale), w2)

    def low_rank(self) -> LoraDelta | None:
        """Products of the factors' factors; a whole one is itself times the identity."""
        (up1, down1), (up2, down2) = _factors(self.w1), _factors(self.w2)
        if not _is_thin(down1.shape[0] * down2.shape[0], self.shape):
            return None
        return LoraDelta(torch.kron(down1, down2).view(-1, *self.shape[1:]), torch.kron(up1, up2), self.scale)


@dataclass(frozen=True)
class DoraDelta(Delta):
    """`W + dW` with the norms that `magnitude` says: of its rows [N], or of its input channels [I]."""

    delta: Delta
    magnitude: Tensor
    by_row: bool

    kind: ClassVar[str] = "DoRA"
    needs_weight: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        """Of dW."""
        return self.delta.rank

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Of dW."""
        return self.delta.scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW."""
        return self.delta.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of dW, and the magnitude."""
        return *self.delta.tensors, self.magnitude

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """`strength * (W' - W)`, float32 [N, K]. Raises `UnsupportedError` without the weight."""
        if weight is None:
            raise UnsupportedError("a DoRA rescales the weight itself, so its change is unknown without it; bake it in")
        old = weight.to(device, torch.float32)
        new = self.delta.dense(device=device).add_(old)
        magnitude = self.magnitude.to(device, torch.float32)
        if self.by_row:
            factor = _over(magnitude, torch.linalg.vector_norm(new, dim=1)).unsqueeze(1)
        else:
            channels = new.view(new.shape[0], magnitude.numel(), -1)
            norm = torch.linalg.vector_norm(channels, dim=(0, 2))
            factor = _over(magnitude, norm).repeat_interleave(channels.shape[2])
        return new.mul_(factor).sub_(old).mul_(strength)


@dataclass(frozen=True)
class RowsDelta(Delta):
    """Changes of some rows each, one below the other: (first row, change). `rows`: N. No factor is of all of them."""

    parts: Sequence[tuple[int, Delta]]
    rows: int
    scale: float = 1.0

    kind: ClassVar[str] = "parts"

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(delta.needs_weight for _, delta in self.parts)

    @property
    def rank(self) -> int:
        """The largest of the parts'."""
        return max(delta.rank for _, delta in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.rows, *self.parts[0][1].shape[1:]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(tensor for _, delta in self.parts for tensor in delta.tensors)

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """float32 [N, K], zeros where no part changes anything."""
        out = torch.zeros((self.rows, torch.Size(self.shape[1:]).numel()), dtype=torch.float32, device=device)
        for start, delta in self.parts:
            mine = slice(start, start + delta.shape[0])
            out[mine] = delta.dense(strength * self.scale, device, None if weight is None else weight[mine])
        return out

    def low_rank(self) -> LoraDelta | None:
        """The ranks of the parts add up; the factors are where the first part's are."""
        thin = [(start, low) for start, delta in self.parts if (low := delta.low_rank()) is not None]
        if len(thin) < len(self.parts):
            return None
        place, ups = thin[0][1].down.device, []
        for start, delta in thin:
            up = torch.zeros((self.rows, delta.rank), dtype=torch.float32, device=place)
            up[start : start + delta.shape[0]] = delta.up.to(place, torch.float32) * delta.scale
            ups.append(up)
        down = torch.cat([delta.down.to(place, torch.float32) for _, delta in thin])
        return LoraDelta(down, torch.cat(ups, dim=1), self.scale)


def _is_thin(rank: int, shape: Sequence[int]) -> bool:
    """Whether factors of a rank take less than the matrix that they make."""
    n, k = shape[0], torch.Size(shape[1:]).numel()
    return rank * (n + k) < n * k


def _factors(part: Tensor | LoraDelta) -> tuple[Tensor, Tensor]:
    """float32 [p, R] and [R, q] whose product a part is, of the least rank that can be told."""
    if isinstance(part, LoraDelta):
        return part.up.float() * part.scale, part.down.float().flatten(1).contiguous()
    whole = part.float().flatten(1).contiguous()
    p, q = whole.shape
    return (whole, torch.eye(q, device=whole.device)) if q <= p else (torch.eye(p, device=whole.device), whole)


def _over(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm, and 0 where there is nothing to scale."""
    return torch.where(norm > 0, magnitude / norm, 0.0)
