"""Files and modules on another device: what is loaded arrives there, and what is saved comes back.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.dispatch import use_backend
from lowbit.experts import quantize_bank
from lowbit.formats import parse_spec
from tests.support import gaussian
from tests.support.module_state import assert_same_there, state
from tests.support.other_device import back, elsewhere, moved, needs_stand_in, other_device
from tests.support.specs import SMALL_SPECS

pytestmark = needs_stand_in
MORE = ("int8(rotation=256)", "svdquant_w4a4(rank=16,act_unsigned=true)", "gguf(type=Q4_K)")
SPECS = [spec for spec in (*SMALL_SPECS, *MORE) if parse_spec(spec).encodable]


class Model(nn.Module):
    """A table, linears with and without a bias, a kernel, a buffer and a bank of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 256)
        self.up = nn.Linear(256, 128)
        self.down = nn.Linear(128, 256, bias=False)
        self.conv = nn.Conv1d(256, 16, 1)
        self.head = nn.Linear(256, 20, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("positions", torch.arange(4))
        self.experts = nn.Parameter(gaussian(3, 64 * 256, seed=8).view(3, 64, 256))

    def forward(self, x: Tensor) -> Tensor:
        """int [T] -> [T, 20]."""
        hidden = self.tokens(x) + self.down(self.up(self.tokens(x)))
        return self.head(hidden) + self.conv(hidden.unsqueeze(-1))[:, :1, 0]


def model(seed: int = 0) -> Model:
    """The same weights for a seed."""
    torch.manual_seed(seed)
    return Model().eval().requires_grad_(False)


def quantized(spec: str) -> Model:
    """On the CPU, experts included where the format takes them."""
    made = model()
    lowbit.quantize_(made, spec)
    fmt = parse_spec(spec)
    if not fmt.folds_bias and fmt.check_shape(64, 256) is None:
        made.experts = nn.Parameter(quantize_bank(made.experts, fmt), requires_grad=False)
    return made


@pytest.mark.parametrize("spec", SPECS)
def test_a_file_is_loaded_and_saved_where_the_module_is(spec, tmp_path):
    """Every tensor arrives, the module runs, and the file written from it has the same bytes."""
    with use_backend("eager"):
        here = quantized(spec)
        path = lowbit.save(here, tmp_path / "here.safetensors")
        there, x = moved(model(1)), torch.tensor([3, 1, 19])
        with other_device():
            lowbit.load(there, path)
            assert_same_there(state(there), state(here))
            assert torch.equal(back(there(elsewhere(x))), here(x))
            again = lowbit.save(there, tmp_path / "there.safetensors")
        assert again.read_bytes() == path.read_bytes()


def test_a_plain_file_is_loaded_where_the_module_is(tmp_path):
    """Nothing quantized."""
    here, there = model(), moved(model(1))
    path = lowbit.save(here, tmp_path / "here.safetensors")
    with other_device():
        lowbit.load(there, path)
        assert_same_there(state(there), state(here))
        assert lowbit.save(there, tmp_path / "there.safetensors").read_bytes() == path.read_bytes()


def test_a_missing_bias_is_made_where_the_weight_is(tmp_path):
    """Where the file has a bias for the shift of the activations, and the module none."""
    spec = "svdquant_w4a4(rank=16,act_unsigned=true)"
    here, there = nn.Sequential(nn.Linear(128, 64, bias=False)), moved(nn.Sequential(nn.Linear(128, 64, bias=False)))
    lowbit.quantize_(here, spec, layout="plain")
    path = lowbit.save(here, tmp_path / "here.safetensors")
    with other_device():
        lowbit.load(there, path)
    assert_same_there(state(there), state(here))
