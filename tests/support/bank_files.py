"""A small checkpoint with banks of experts, a plan for it, and the module that it is loaded into."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.checkpoint.plan import make_plan
from lowbit.formats.parts import raw_bytes
from tests.support.tensors import outlier_weight

FORMATS = ["int8", "nvfp4", "mxfp4", "fp8_e4m3", "awq_w4a16(group_size=32)", "svdquant_w4a4(rank=8)", "wna16"]
UP, DOWN = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"


def tensors(experts: int = 4):
    """A layer of experts as transformers 5 names it, down turned over, a bias a bank, a router and a linear."""
    stacks = [outlier_weight(experts * 64, 128, seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    return {
        UP: stacks[0].reshape(experts, 64, 128),
        DOWN: stacks[1].reshape(experts, 128, 64) * 0.5,
        f"{UP}_bias": torch.ones(experts, 64, dtype=torch.bfloat16),
        "layers.0.mlp.gate.weight": torch.ones(experts, 128, dtype=torch.bfloat16),
        "layers.0.self_attn.o_proj.weight": outlier_weight(128, 128, dtype=torch.bfloat16),
    }


def planned(source, spec="int8", **options):
    """A plan by which up is [E, N, K] and down [E, K, N]."""
    return make_plan(source, spec, **{"solver": "rtn", "bank_transposed": [r"down_proj"], **options})


def by_layer(plan):
    """The plan of every tensor by its layer."""
    return {tensor.layer: tensor for tensor in plan.tensors()}


def module(experts: int = 4):
    """A module into which these banks go."""
    root = nn.Module()
    root.layers = nn.ModuleList([nn.Module()])
    root.layers[0].mlp = nn.ModuleDict({"experts": nn.Module()})
    held = root.layers[0].mlp["experts"]
    held.gate_up_proj = nn.Parameter(torch.zeros(experts, 64, 128, dtype=torch.bfloat16), requires_grad=False)
    held.down_proj = nn.Parameter(torch.zeros(experts, 128, 64, dtype=torch.bfloat16), requires_grad=False)
    return root, held


def same_parts(bank, other):
    """Whether two banks are bit for bit the same."""
    told = [(each.spec, each.matrix, each.transposed, each.shape) for each in (bank, other)]
    pairs = zip(bank.part_list, other.part_list, strict=True)
    return told[0] == told[1] and all(torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in pairs)
