"""The GPU benchmark on CPU tensors, with clocks that obey."""

import torch

from benchmarks import gpu
from benchmarks.gpu_timing import GpuContender

N, K = 256, 512
L2 = 1 << 16
CPU = torch.device("cpu")


class Clock:
    """Time passes by a second whenever it is asked for."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        """The seconds."""
        self.now += 1.0
        return self.now


class FakeRunner:
    """Two rounds over the copies, in a time that the name sets."""

    how = "fake"

    def __init__(self, call, copies, seconds):
        self.call, self.calls, self.seconds = call, 2 * copies, seconds

    def __call__(self):
        """Run all calls."""
        for index in range(self.calls):
            self.call(index)
        return self.calls * self.seconds


def bench(**seconds):
    """A `Bench` on the CPU; names not given take a millisecond."""

    def contender(name, call, copies):
        wanted = next((value for key, value in seconds.items() if name.lower().startswith(key)), 1e-3)
        return GpuContender(name, call, copies=copies, make=lambda call, copies: FakeRunner(call, copies, wanted))

    return gpu.Bench(
        CPU, L2, 1e9, {"bfloat16": 1e12}, clock=Clock(), contender=contender, rounds=2, others=False, takes_eager=True
    )  # fmt: skip


def never():
    """No budget is over."""
    return False
