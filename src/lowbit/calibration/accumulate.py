"""What is kept of one input while its rows stream past: second moments in two halves, ranges, and some of the rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.solvers.base import Statistics

ROWS_KEPT = 256  # rows of x in `Statistics.samples`
BINS = 4096  # 12 of the 31 bits of |x| as float32: 8 of exponent, 4 of mantissa
FLUSH = 1024  # rows that are gathered before a product: many thin products take several times as long as a thick one
_PANEL = 192  # columns of one product: only the panels right of the diagonal are computed
_COUNTED = 2**16  # elements of one flush that go into the histogram; more would cost as much as the products
_CHUNK = 2**25  # elements of rows that are worked on at once, as float32


def state_bytes(k: int, *, full: bool) -> int:
    """Bytes of memory that an `Accumulator` takes at its largest, apart from what is small for every K."""
    moments = 2 * k * (4 * k if full else 8)
    return moments + 4 * k * (2 * FLUSH + ROWS_KEPT)


class Moment:
    """The sum of x xᵀ over rows: float32 [K, K] (its upper triangle), or of its diagonal: float64 [K]."""

    def __init__(self, k: int, *, full: bool, device: torch.device) -> None:
        self.total = torch.zeros(
            (k, k) if full else (k,), dtype=torch.float32 if full else torch.float64, device=device
        )
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add float32 rows [R, K]."""
        self.rows += x.shape[0]
        if self.total.dim() == 1:
            self.total += x.double().square_().sum(0)
            return
        k = x.shape[1]
        for start in range(0, k, _PANEL):
            stop = min(start + _PANEL, k)
            self.total[start:stop, start:].addmm_(x[:, start:stop].mT, x[:, start:])

    def mean(self) -> Tensor | None:
        """E[x xᵀ] as float32 on the CPU, symmetric to the bit; None without rows."""
        if not self.rows:
            return None
        mean = (self.total / self.rows).float()
        if mean.dim() == 2:
            mean = mean.triu_()
            mean += mean.triu(1).mT
        return mean.cpu()


class Reservoir:
    """Up to `ROWS_KEPT` rows, each as likely as any other: those with the smallest of random keys."""

    def __init__(self, k: int, seed: int, device: torch.device) -> None:
        self.rows = torch.zeros((0, k), device=device)
        self.keys = torch.zeros(0, dtype=torch.float64)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """Offer float32 rows [R, K]."""
        keys = torch.rand(x.shape[0], dtype=torch.float64, generator=self._random)
        if len(self.keys) == ROWS_KEPT:
            better = (keys < self.keys.max()).nonzero()[:, 0]
            keys, x = keys[better], x[better.to(x.device)]
            if not len(keys):
                return
        self.rows, self.keys = torch.cat((self.rows, x)), torch.cat((self.keys, keys))
        if len(self.keys) > ROWS_KEPT:
            best = self.keys.topk(ROWS_KEPT, largest=False).indices.sort().values
            self.rows, self.keys = self.rows[best.to(x.device)], self.keys[best]

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        return {"rows": self.rows, "keys": self.keys, "random": self._random.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.rows, self.keys = state["rows"].to(self.rows.device), state["keys"]
        self._random.set_state(state["random"])


class Accumulator:
    """The running statistics of one input x of K channels. Rows are gathered and worked on in batches of `FLUSH`.

    `full` keeps the whole second moment, else its diagonal. The result depends on the order of the rows and on how
    they come (the last bits, and which rows are counted and kept), on nothing else.
    """

    def __init__(self, k: int, *, full: bool, device: torch.device, seed: int = 0) -> None:
        self.k, self.full, self.device = k, full, device
        self.halves = tuple(Moment(k, full=full, device=device) for _ in range(2))
        self.sum = torch.zeros(k, dtype=torch.float64, device=device)
        self.minimum = torch.full((k,), torch.inf, device=device)
        self.maximum = torch.full((k,), -torch.inf, device=device)
        self.magnitudes = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.reservoir = Reservoir(k, seed, device)
        self._pending: tuple[list[Tensor], list[Tensor]] = ([], [])

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows seen of each half."""
        first, second = (half.rows + sum(map(len, rows)) for half, rows in zip(self.halves, self._pending, strict=True))
        return first, second

    def add(self, x: Tensor, half: int) -> None:
        """Take rows [R, K] of any float dtype, finite, into half 0 (solved with) or 1 (held out)."""
        for piece in _pieces(x):
            pending = self._pending[half]
            pending.append(piece.to(self.device, torch.float32, copy=True))
            if sum(map(len, pending)) >= FLUSH:
                self._flush(half)

    def _flush(self, half: int) -> None:
        pending = self._pending[half]
        if not pending:
            return
        x = pending[0] if len(pending) == 1 else torch.cat(pending)
        pending.clear()
        self.halves[half].add(x)
        self.sum += x.sum(0, dtype=torch.float64)
        low, high = torch.aminmax(x, dim=0)
        torch.minimum(self.minimum, low, out=self.minimum)
        torch.maximum(self.maximum, high, out=self.maximum)
        step = -(-x.numel() // _COUNTED)
        bins = x[::step].abs().view(torch.int32) >> 19
        self.magnitudes += torch.bincount(bins.flatten(), minlength=BINS)
        if half == 0:
            self.reservoir.add(x)

    def finish(self) -> Statistics:
        """The statistics of all rows so far, on the CPU. Nothing may be added afterwards."""
        for half in range(2):
            self._flush(half)
        tokens = self.tokens
        if not sum(tokens):
            return Statistics()
        return Statistics(
            hessian=self.halves[0].mean(),
            tokens=tokens[0],
            held_out=self.halves[1].mean(),
            held_out_tokens=tokens[1],
            absmax=torch.maximum(self.minimum.abs(), self.maximum.abs()).cpu(),
            mean=(self.sum / sum(tokens)).float().cpu(),
            minimum=self.minimum.cpu(),
            maximum=self.maximum.cpu(),
            samples=self.reservoir.rows.cpu(),
            magnitudes=self.magnitudes.cpu(),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything, by name, for an `Accumulator` of the same K to `restore`; shares memory with this one."""
        rows = {f"pending_{half}": torch.cat(self._pending[half]) for half in range(2) if self._pending[half]}
        totals = {f"total_{half}": moment.total for half, moment in enumerate(self.halves)}
        counts = torch.tensor([moment.rows for moment in self.halves])
        ranges = {name: getattr(self, name) for name in ("sum", "minimum", "maximum", "magnitudes")}
        kept = {f"reservoir_{name}": value for name, value in self.reservoir.state().items()}
        return {"counts": counts, **rows, **totals, **ranges, **kept}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for index, moment in enumerate(self.halves):
            moment.rows = int(state["counts"][index])
            moment.total = state[f"total_{index}"].to(self.device)
            if f"pending_{index}" in state:
                self._pending[index].append(state[f"pending_{index}"].to(self.device))
        for name in ("sum", "minimum", "maximum", "magnitudes"):
            setattr(self, name, state[name].to(self.device))
        start = "reservoir_"
        self.reservoir.restore({name.removeprefix(start): t for name, t in state.items() if name.startswith(start)})


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Rows in pieces whose copy as float32 stays small."""
    size = max(FLUSH, _CHUNK // max(x.shape[1], 1))
    return iter(x.split(size)) if len(x) else iter(())
