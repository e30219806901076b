"""What tests of several commands begin with."""

from __future__ import annotations

import pytest

from lowbit.checkpoint.source import open_source
from tests.support.checkpoints import save_model


@pytest.fixture
def source(tmp_path):
    """An open small model in one file."""
    with open_source(save_model(tmp_path / "in.safetensors")) as opened:
        yield opened
