"""A model whose linears are in coalesced_int4 decodes through int4_plain_mm: its logits, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import dispatch
from lowbit.layouts import coalesced_int4
from lowbit.numerics.w4a8 import quantize_blocks
from tests.support.llama_like import LINEARS, LlamaLike, decoded, tokens_of

SPEC = "wna16(group_size=32,zero_point=true)"


def quantized(model: LlamaLike, layout: str) -> LlamaLike:
    """A copy whose linears are quantized and in a layout."""
    made = copy.deepcopy(model)
    lowbit.quantize_(made, {rf"(^|\.)({LINEARS})$": SPEC}, layout="plain")
    lowbit.repack_(made, layout)
    return made


def linears(model: nn.Module) -> list[nn.Linear]:
    """All linears of a model."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


class Rounded(nn.Module):
    """A linear of plain floats whose input is rounded to int8 by blocks of 32."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B, N]."""
        codes, scale = quantize_blocks(x)
        return F.linear((codes.float().unflatten(1, (-1, 32)) * scale.unsqueeze(-1)).flatten(1), self.weight)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_logits(batch, backend):
    """They are those of dequantized weights and rounded activations; nearly all that they lose the weights cost."""
    if dispatch.load(backend) is not None:
        pytest.skip(f"no {backend} backend")
    model, tokens = LlamaLike(batch).eval(), tokens_of(batch)
    packed, plain = quantized(model, coalesced_int4.NAME), quantized(model, "plain")
    assert {layer.weight.kernel_layout for layer in linears(packed)} == {coalesced_int4.NAME}
    with dispatch.use_backend(backend):
        found = decoded(packed, tokens)
        by_weights = decoded(plain, tokens)
    rounded = copy.deepcopy(model)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            rounded.set_submodule(name, Rounded(layer.weight.dequantize()))
    assert difference(found, decoded(rounded, tokens)) < 1e-3
    floats = decoded(model, tokens)
    assert 1e-4 < difference(found, by_weights) < 0.01
    assert difference(found, floats) < 1.02 * difference(by_weights, floats) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8])
@torch.inference_mode()
def test_a_graph_of_a_step(batch):
    """A step captured in a CUDA graph and replayed token by token gives the bits of the steps that were not."""
    if (why := dispatch.load("cuda")) is not None:
        pytest.skip(why)
    model = quantized(LlamaLike(batch).bfloat16().eval(), coalesced_int4.NAME).cuda()
    tokens = tokens_of(batch).cuda()
    for layer in linears(model):
        weight = layer.weight
        arguments = (weight.format, torch.empty(batch, weight.shape[1]).bfloat16().cuda(), weight.parts, None)
        chosen = dispatch.select("linear", weight.format.name, weight.kernel_layout, "cuda", arguments)
        assert (chosen.backend, chosen.layout) == ("cuda", coalesced_int4.NAME)
    wanted = decoded(model, tokens)
    model.forget()
    token, position = tokens[0].clone(), torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, position)
    model.forget()
    found = []
    for at, one in enumerate(tokens):
        token.copy_(one)
        position.fill_(at)
        graph.replay()
        found.append(logits.clone())
    torch.cuda.synchronize()
    assert torch.isfinite(wanted).all()
    assert torch.equal(torch.stack(found), wanted)
