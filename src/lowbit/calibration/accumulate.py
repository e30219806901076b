"""What is kept of one input while its rows stream past: second moments in two halves, ranges, and some of the rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor
from lowbit.ops.column_ranges import BINS, add_column_ranges
from lowbit.ops.second_moment import add_second_moment
from lowbit.solvers.base import Statistics

ROWS_KEPT = 256  # rows of x in `Statistics.samples`
FLUSH = 1024  # rows that are gathered before a product: many thin products take several times as long as a thick one
_BLOCK = 192  # rows that are made symmetric together
_COUNTED = 2**16  # elements of one flush that go into the histogram; more would cost as much as the products


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
        """Add rows [R, K] of float32 or bfloat16."""
        self.rows += x.shape[0]
        if self.total.dim() == 1:
            self.total += x.float().square().sum(0)  # float32 for up to FLUSH rows, float64 from there on
            return
        add_second_moment(self.total, x)

    def finish(self) -> Tensor | None:
        """E[x xᵀ] as float32 on the CPU, symmetric to the bit, in the memory of the sum; None without rows."""
        if not self.rows:
            return None
        mean = self.total.div_(divisor(self.rows, self.total)).float()
        if mean.dim() == 2:
            for start in range(0, len(mean), _BLOCK):  # what stays in the cache while it is transposed
                stop = start + _BLOCK
                corner = mean[start:stop, start:stop].triu_()
                corner += corner.triu(1).mT
                mean[stop:, start:stop] = mean[start:stop, stop:].mT
        return mean.cpu()


class Gathered:
    """Rows [R, K] of any float dtype in blocks of so many `rows`, in a buffer that is used again and again.

    Blocks are bfloat16 where all rows so far are, else float32: both hold the values as they came, and products of
    bfloat16 may be faster.
    """

    def __init__(self, k: int, device: torch.device, rows: int = FLUSH) -> None:
        self.count = 0
        self._shape, self._device = (rows, k), device
        self._buffer: Tensor | None = None

    def add(self, x: Tensor, index: Tensor | None = None) -> Iterator[Tensor]:
        """Take the rows of x at `index` (int64 [I], None for all) and give each block that gets full."""
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if self._buffer is None:
            self._buffer = torch.empty(self._shape, dtype=dtype, device=self._device)
        elif dtype != torch.bfloat16:
            self._buffer = self._buffer.float()
        done, total = 0, len(x) if index is None else len(index)
        while done < total:
            stop = min(done + self._shape[0] - self.count, total)
            into = self._buffer[self.count : self.count + stop - done]
            if index is None:
                into.copy_(x[done:stop])
            elif x.dtype == into.dtype and x.device == into.device:
                torch.index_select(x, 0, index[done:stop], out=into)
            else:
                into.copy_(x.index_select(0, index[done:stop]))
            self.count += stop - done
            done = stop
            if self.count == self._shape[0]:
                self.count = 0
                yield self._buffer

    def rest(self) -> Tensor:
        """The rows of the block that is not full; shares memory with it."""
        return torch.empty((0, self._shape[1])) if self._buffer is None else self._buffer[: self.count]


class Reservoir:
    """Up to `ROWS_KEPT` rows, each as likely as any other: those with the smallest of random keys."""

    def __init__(self, k: int, seed: int, device: torch.device) -> None:
        self.rows = torch.zeros((0, k), device=device)
        self.keys = torch.zeros(0, dtype=torch.float64)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """Offer rows [R, K] of float32 or bfloat16."""
        keys = torch.rand(x.shape[0], dtype=torch.float64, generator=self._random)
        offered = torch.arange(x.shape[0])
        if len(self.keys) == ROWS_KEPT:
            offered = (keys < self.keys.max()).nonzero()[:, 0]
            if not len(offered):
                return
        old = len(self.keys)
        joined, best = torch.cat((self.keys, keys[offered])), torch.arange(old + len(offered))
        if len(joined) > ROWS_KEPT:
            best = joined.topk(ROWS_KEPT, largest=False).indices.sort().values
        stay, come = best[best < old].to(x.device), offered[best[best >= old] - old].to(x.device)
        self.rows, self.keys = torch.cat((self.rows[stay], x[come].float())), joined[best]

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        return {"rows": self.rows, "keys": self.keys, "random": self._random.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.rows, self.keys = state["rows"].to(self.rows.device), state["keys"]
        self._random.set_state(state["random"])


class Accumulator:
    """The running statistics of one input x of K channels. Rows are gathered and worked on `FLUSH` at a time.

    `full` keeps the whole second moment, else its diagonal. The result depends on the order of the rows of each half
    (the last bits, and which rows are counted and kept) and on nothing else.
    """

    def __init__(self, k: int, *, full: bool, device: torch.device, seed: int = 0) -> None:
        self.k, self.full, self.device = k, full, device
        self.halves = tuple(Moment(k, full=full, device=device) for _ in range(2))
        self.sum = torch.zeros(k, dtype=torch.float64, device=device)
        self.minimum = torch.full((k,), torch.inf, device=device)
        self.maximum = torch.full((k,), -torch.inf, device=device)
        self.magnitudes = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.reservoir = Reservoir(k, seed, device)
        self._gathered = (Gathered(k, device), Gathered(k, device))

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows seen of each half."""
        first, second = (half.rows + rows.count for half, rows in zip(self.halves, self._gathered, strict=True))
        return first, second

    def add(self, x: Tensor, half: int, index: Tensor | None = None) -> None:
        """Take rows [R, K] of any float dtype, finite, into half 0 (solved with) or 1 (held out).

        `index`: int64, on the device of x, the rows to take; None for all.
        """
        for block in self._gathered[half].add(x, index):
            self._work(block, half)

    def _work(self, x: Tensor, half: int) -> None:
        self.halves[half].add(x)
        step = max(1, -(-x.numel() // _COUNTED))
        add_column_ranges(x, self.sum, self.minimum, self.maximum, self.magnitudes, step)
        if half == 0:
            self.reservoir.add(x)

    def finish(self) -> Statistics:
        """The statistics of all rows so far, on the CPU. Nothing may be asked of it afterwards."""
        tokens = self.tokens
        for half, gathered in enumerate(self._gathered):
            if gathered.count:
                self._work(gathered.rest(), half)
                gathered.count = 0
        if not sum(tokens):
            return Statistics()
        return Statistics(
            hessian=self.halves[0].finish(),
            tokens=tokens[0],
            held_out=self.halves[1].finish(),
            held_out_tokens=tokens[1],
            absmax=torch.maximum(self.minimum.abs(), self.maximum.abs()).cpu(),
            mean=(self.sum / divisor(sum(tokens), self.sum)).float().cpu(),
            minimum=self.minimum.cpu(),
            maximum=self.maximum.cpu(),
            samples=self.reservoir.rows.cpu(),
            magnitudes=self.magnitudes.cpu(),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything, by name, for an `Accumulator` of the same K to `restore`; shares memory with this one."""
        rows = {f"pending_{half}": rows.rest() for half, rows in enumerate(self._gathered) if rows.count}
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
                self.add(state[f"pending_{index}"], index)
        for name in ("sum", "minimum", "maximum", "magnitudes"):
            setattr(self, name, state[name].to(self.device))
        start = "reservoir_"
        self.reservoir.restore({name.removeprefix(start): t for name, t in state.items() if name.startswith(start)})
