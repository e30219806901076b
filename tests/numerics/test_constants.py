"""Tensors that are kept: made once, outside of what their first reader is in."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from lowbit.numerics import constants, cuda_graphs
from lowbit.numerics.constants import kept

GPU = torch.device("cuda", 1)


@pytest.fixture
def made():
    """The arguments that the functions of a test were called with."""
    return []


def function(made, maxsize):
    """A kept function that notes its calls."""

    @kept(maxsize)
    def ones(size, device):
        made.append((size, device, torch.is_inference_mode_enabled()))
        return torch.ones(size)

    return ones


def test_a_tensor_is_made_once_and_outside_inference_mode(made):
    """The same tensor every time, by the arguments; autograd takes it although inference mode asked first."""
    ones = function(made, None)

    with torch.inference_mode():
        first = ones(3, torch.device("cpu"))

    assert ones(3, torch.device("cpu")) is first
    assert ones(4, torch.device("cpu")).shape == (4,)
    assert made == [(3, torch.device("cpu"), False), (4, torch.device("cpu"), False)]
    assert not first.is_inference()


@pytest.mark.parametrize(("maxsize", "device", "apart"), [(None, GPU, [GPU]), (4, GPU, []), (None, "cpu", [])])
def test_what_graphs_may_read_is_made_apart(made, monkeypatch, maxsize, device, apart):
    """On a GPU, what is kept for good is made beside the graph that needs it first, once."""
    seen = []
    monkeypatch.setattr(constants, "made_apart", lambda make, where: seen.append(where) or make())
    ones = function(made, maxsize)

    assert ones(3, torch.device(device)) is ones(3, torch.device(device))

    assert seen == apart
    assert len(made) == 1


class Stream:
    """Notes that it was waited for, and whether its values were complete."""

    def __init__(self, log):
        self._log = log

    def synchronize(self):
        """As CUDA's streams have it."""
        self._log.append("waited")


def test_apart_is_another_thread_and_stream(monkeypatch):
    """On the tensor's GPU, in a mode that no capture forbids, and ready when it is there; errors come through."""
    log = []
    stream = Stream(log)

    @contextlib.contextmanager
    def using(what):
        log.append(what)
        yield

    def exchange(mode):
        log.append(mode._obj.value)
        mode._obj.value = 0

    monkeypatch.setattr(cuda_graphs, "_driver", lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", using)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", using)

    def make():
        log.append(threading.current_thread() is threading.main_thread())
        return torch.ones(2)

    assert torch.equal(cuda_graphs.made_apart(make, GPU), torch.ones(2))
    assert log == [GPU, 2, stream, False, "waited", 0]

    def fail():
        raise ValueError("no memory")

    log.clear()
    with pytest.raises(ValueError, match="no memory"):
        cuda_graphs.made_apart(fail, GPU)
    assert log == [GPU, 2, stream, 0]
