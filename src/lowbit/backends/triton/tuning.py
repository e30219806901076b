"""A Triton kernel and the tile shapes it may run in: the fastest is found at the first call of a shape and remembered.

`@tuned(configs, key)` makes of a jitted function an object that is called with a grid and keyword arguments. At the
first call with new values of `key` on a device every config is compiled and timed (`TRITON_PRINT_AUTOTUNING=1` prints
what was found); the choice is kept in memory and, by the kernel's source, Triton's version and the device, on disk
(`LOWBIT_CACHE`, by default a folder of the user's cache). While a CUDA graph is captured nothing can be timed: a shape
that was never seen runs in the first config, so warm up first. In the interpreter it is the first config always.

A config that does not compile is passed over, and so is one of which the compiler left nothing but a trap, before it
can end the process; when none is left, `UnsupportedError` names the kernel and the shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from lowbit.backends.cache import cache_folder, write_whole
from lowbit.backends.triton import device
from lowbit.errors import UnsupportedError
from lowbit.numerics.cuda_graphs import beside_captures

Arguments = Mapping[str, Any]
Grid = Callable[[Arguments], tuple[int, ...]]
_WARM_UP, _MEASURE = 5, 20  # milliseconds a config, after compiling it
_STORES = re.compile(r"\bst\.global|\bred\.|\batom\.|cp\.async\.bulk")  # what of PTX reaches memory
_NO_NAME = re.compile(r"[^\w.-]")  # what the name of a GPU has, and that of a file has not: a slash, for one


@dataclass(frozen=True)
class Config:
    """One way to run a kernel: values of its constants, warps a program, and stages of its pipeline."""

    pairs: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The values of the kernel's constants by name."""
        return dict(self.pairs)

    @property
    def options(self) -> dict[str, int]:
        """Beside the constants, the keyword arguments of a launch. Products and sums are not fused behind our back."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def __str__(self) -> str:
        shown = {**self.constants, "num_warps": self.warps, "num_stages": self.stages}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def config(warps: int = 4, stages: int = 3, **constants: int) -> Config:
    """A `Config` of these constants."""
    return Config(tuple(constants.items()), warps, stages)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded, not run."""

    kernel: TunedKernel
    arguments: Arguments
    configs: tuple[Config, ...]


_recorded: ContextVar[list[Launch] | None] = ContextVar("lowbit_triton_launches", default=None)
KERNELS: list[TunedKernel] = []


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within this block launches are noted instead of run: what is compiled without a device is what runs on one."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@dataclass
class TunedKernel:
    """See the module. `prune(configs, arguments)` leaves out what makes no sense for a call; at least one stays."""

    function: Any
    configs: tuple[Config, ...]
    key: tuple[str, ...]
    prune: Callable[[Sequence[Config], Arguments], Sequence[Config]] | None = None
    _chosen: dict[tuple[Any, ...], Config] = field(default_factory=dict)
    _choosing: threading.Lock = field(default_factory=threading.Lock)  # threads would time each other

    @property
    def name(self) -> str:
        """The name of the jitted function."""
        return str(self.function.__name__)

    def __call__(self, grid: Grid, where: torch.device, **arguments: Any) -> Config:
        """Launch on a device's current stream, and return the config that was used."""
        launches = _recorded.get()
        if launches is not None:
            configs = tuple(self._sensible(arguments))
            launches.append(Launch(self, arguments, configs))
            return configs[0]
        with device.on(where), beside_captures() if device.capturing(where) else contextlib.nullcontext():
            config = self._choose(grid, where, arguments)
            self._run(grid, arguments, config)
        return config

    def _run(self, grid: Grid, arguments: Arguments, config: Config) -> None:
        self.function[grid({**arguments, **config.constants})](**arguments, **config.constants, **config.options)

    def _sensible(self, arguments: Arguments) -> Sequence[Config]:
        return self.prune(self.configs, arguments) if self.prune else self.configs

    def _choose(self, grid: Grid, where: torch.device, arguments: Arguments) -> Config:
        key = (where, *(_plain(arguments[name]) for name in self.key))
        found = self._chosen.get(key)
        if found is not None:
            return found
        configs = self._sensible(arguments)
        if len(configs) == 1 or device.INTERPRETED:
            return self._chosen.setdefault(key, configs[0])
        if device.capturing(where):
            return configs[0]
        with self._choosing:
            found = self._chosen.get(key) or self._recall(where, key, configs)
            if found is None:
                found, timed = self._measure(grid, arguments, configs)
                if timed:
                    self._remember(where, key, found)
            self._chosen[key] = found
        return found

    def _measure(self, grid: Grid, arguments: Arguments, configs: Sequence[Config]) -> tuple[Config, bool]:
        """The fastest, and whether it was timed: where memory is short the first that runs is taken."""
        times: dict[Config, float] = {}
        failures: dict[str, str] = {}
        for config in configs:
            found = self._time(grid, arguments, config)
            if isinstance(found, str):
                failures[str(config)] = found
            else:
                times[config] = found
        shown = {name: _plain(arguments[name]) for name in self.key}
        if not times:
            raise UnsupportedError(
                f"no tile shape of the Triton kernel {self.name} works for {shown}; use another backend "
                "(lowbit.use_backend), and report this with the lines below",
                failures,
            )
        best = min(times, key=lambda config: times[config])
        if os.environ.get("TRITON_PRINT_AUTOTUNING") == "1":
            print(f"lowbit: {self.name} {shown}: {best} takes {times[best] * 1e3:.1f} us, best of {len(times)}")  # noqa: T201
        return best, math.isfinite(times[best])

    def _time(self, grid: Grid, arguments: Arguments, config: Config) -> float | str:
        """Milliseconds, or why the config cannot run: out of shared memory, a failed assembly, nothing assembled."""
        try:
            if self._is_empty(grid, arguments, config):
                return "the compiler left nothing of it but a trap"
            self._run(grid, arguments, config)
            return float(
                do_bench(
                    lambda: self._run(grid, arguments, config), warmup=_WARM_UP, rep=_MEASURE, return_mode="median"
                )
            )
        except torch.cuda.OutOfMemoryError:  # a kernel allocates nothing: it is the buffer that empties the cache
            return math.inf
        except (triton.TritonError, RuntimeError) as error:
            return str(error).strip().partition("\n")[0]

    def _is_empty(self, grid: Grid, arguments: Arguments, config: Config) -> bool:
        """Whether the compiled config stores nothing. To run such a one is an error that no later call survives."""
        made = self.function.warmup(grid=grid, **arguments, **config.constants, **config.options)
        ptx = getattr(made, "asm", {}).get("ptx")
        return ptx is not None and _STORES.search(ptx) is None

    # ---- on disk ----------------------------------------------------------------------------------------------------

    @cached_property
    def _fingerprint(self) -> str:
        text = "\0".join([self.function.cache_key, triton.__version__, *map(str, self.configs)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _file(self, where: torch.device) -> Path:
        chip = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
        return cache_folder("triton") / f"{self.name}-{_NO_NAME.sub('_', chip)}-{self._fingerprint}.json"

    def _stored(self, where: torch.device) -> dict[str, str]:
        try:
            found = json.loads(self._file(where).read_text())
        except (OSError, ValueError):  # not there yet, or cut short: it is only a cache
            return {}
        return found if isinstance(found, dict) else {}

    def _recall(self, where: torch.device, key: tuple[Any, ...], configs: Sequence[Config]) -> Config | None:
        text = self._stored(where).get(repr(key[1:]))
        return next((config for config in configs if str(config) == text), None)

    def _remember(self, where: torch.device, key: tuple[Any, ...], config: Config) -> None:
        text = json.dumps({**self._stored(where), repr(key[1:]): str(config)}, indent=1)
        write_whole(self._file(where), text.encode())


def tuned(
    configs: Sequence[Config],
    key: Sequence[str] = (),
    prune: Callable[[Sequence[Config], Arguments], Sequence[Config]] | None = None,
) -> Callable[[Any], TunedKernel]:
    """Make of a jitted function a `TunedKernel`; see the module."""

    def make(function: Any) -> TunedKernel:
        made = TunedKernel(function, tuple(configs), tuple(key), prune)
        KERNELS.append(made)
        return made

    return make


def bucket(m: int) -> int:
    """The number of tokens as a key: rounded up to a power of two, so that few numbers are timed."""
    return 1 << max(0, m - 1).bit_length()


def _plain(value: Any) -> Any:
    return str(value.dtype) if isinstance(value, torch.Tensor) else getattr(value, "value", value)
