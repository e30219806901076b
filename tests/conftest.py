"""What holds in every test: a fixed seed, no network, and memory that is never zero by luck."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its thread pool has started would warn

import random

import hypothesis
import numpy as np
import pytest
import torch

from tests.support.poison import poisoned_empty

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]

hypothesis.settings.register_profile(
    "lowbit",
    deadline=None,  # a shared machine stalls; the test runner's own time limits catch what hangs
    derandomize=True,  # the same examples on every machine
    database=None,
    max_examples=50,
)
hypothesis.settings.load_profile("lowbit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may use the global state)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(request):
    """Memory from torch.empty and its kin is NaN (or 0xA5 bytes) unless the test is marked `real_empty`."""
    if request.node.get_closest_marker("real_empty"):
        yield
        return
    with poisoned_empty():
        yield


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Each device that a test of device-independent code should run on."""
    return torch.device(request.param)
