"""Scales folded into the layer before: the same output, and less of it lost in few bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowbit.calibration import calibrate
from lowbit.errors import SolverError, UnsupportedError
from lowbit.nn import quantize_
from lowbit.smoothing import fold_scales_, llama_groups, rescaled, smooth_
from lowbit.solvers import Statistics
from lowbit.solvers.input_scale import magnitudes_of
from tests.support import gaussian

K, HIDDEN = 64, 128


class Attention(nn.Module):
    """Values only: what matters is v before o."""

    def __init__(self, narrow: int = K) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, narrow)
        self.o_proj = nn.Linear(K, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, K]."""
        mixed = torch.softmax(self.q_proj(x) @ self.k_proj(x).t() / 50, dim=-1) @ self.v_proj(x)
        return self.o_proj(mixed.repeat(1, K // mixed.shape[1]))


class Mlp(nn.Module):
    """A gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, HIDDEN, bias=False), nn.Linear(K, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, K, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, K]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Named as Llama's; a norm with some large channels, as trained models have."""

    def __init__(self, narrow: int = K) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(K), nn.LayerNorm(K)
        self.self_attn, self.mlp = Attention(narrow), Mlp()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
            for norm in (self.input_layernorm, self.post_attention_layernorm):
                norm.weight.copy_(1 + 0.1 * torch.randn(K, generator=generator))
                norm.weight[::9] *= 15

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, K]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def observed(block: nn.Module, x: torch.Tensor) -> dict[str, Statistics]:
    """Second moments of every linear's input."""
    found, hooks = {}, []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):

            def see(module, args, name=name):
                found[name] = Statistics(hessian=args[0].t() @ args[0] / len(args[0]), tokens=len(args[0]))

            hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        block(x)
    for hook in hooks:
        hook.remove()
    return found


def loss(block: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    """The squared error of the output relative to it."""
    with torch.no_grad():
        out, wanted = block(x), reference(x)
    return float((out - wanted).square().sum() / wanted.square().sum())


@pytest.fixture
def block() -> Block:
    """A block in evaluation mode."""
    return Block().eval().requires_grad_(False)


def test_the_output_stays_the_same(block):
    """Folding all groups changes the weights by far and the output by nothing but rounding."""
    x = gaussian(256, K)
    folded = copy.deepcopy(block)
    done = smooth_(folded, observed(block, x), "awq_w4a16(group_size=32)")

    assert set(done.scales) == {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
    assert float((folded.self_attn.q_proj.weight - block.self_attn.q_proj.weight).abs().max()) > 0.1
    assert loss(folded, block, x) ** 0.5 < 1e-5


@pytest.mark.parametrize(("spec", "share"), [("awq_w4a16(group_size=32)", 0.75), ("int8(granularity=tensor)", 0.9)])
def test_less_is_lost_in_few_bits(block, spec, share):
    """Quantized afterwards, on other input, the block loses a smaller part of its output."""
    plain, folded, known = copy.deepcopy(block), copy.deepcopy(block), observed(block, gaussian(1024, K))
    done = smooth_(folded, known, spec)
    quantize_(plain, spec, solver="scale_search", statistics=known)
    quantize_(folded, spec, solver="scale_search", statistics=done.statistics)
    x = gaussian(512, K, seed=3)

    assert loss(folded, block, x) < share * loss(plain, block, x)


def test_statistics_follow_the_input(block):
    """The statistics returned are those that calibrating the folded block would give."""
    x, folded = gaussian(256, K), copy.deepcopy(block)
    done = smooth_(folded, observed(block, x), "nvfp4")

    for name, seen in observed(folded, x).items():
        torch.testing.assert_close(done.statistics[name].hessian, seen.hessian, rtol=1e-3, atol=1e-4)


def test_statistics_follow_the_gradient(block):
    """Those of linears whose rows took a scale have the gradients that calibrating the folded block would give."""
    x, folded = [gaussian(64, K)], copy.deepcopy(block)
    known = calibrate(block, x, gradients=True)
    done = smooth_(folded, known, "nvfp4")

    assert {"self_attn.v_proj", "mlp.up_proj"} <= set(done.scales)
    for name, seen in calibrate(folded, x, gradients=True).items():
        found = done.statistics[name]
        for a, b in ((found.hessian, seen.hessian), (found.output_hessian, seen.output_hessian)):
            assert float((a - b).norm()) < 1e-4 * float(b.norm())


def test_rescaled_statistics_are_those_of_the_scaled_input():
    """Every field is that of x * scale; magnitudes are counted anew, of the kept samples."""
    x, scale = gaussian(100, 8), torch.linspace(0.5, 2, 8)

    def statistics(rows):
        low, high = rows.amin(0), rows.amax(0)
        return Statistics(
            hessian=rows.t() @ rows, tokens=9, held_out=(rows * rows).mean(0), held_out_tokens=8,
            absmax=rows.abs().amax(0), mean=rows.mean(0), minimum=low, maximum=high, samples=rows,
            magnitudes=magnitudes_of(rows),
        )  # fmt: skip

    found, wanted = rescaled(statistics(x), scale), statistics(x * scale)
    for name, value in vars(wanted).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "before", [nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(5, 8), nn.Linear(5, 8, bias=False)], ids=lambda m: str(m)[:14]
)
def test_folding_is_exact(before):
    """A norm or linear and the linears behind it compute the same after a scale is folded in."""
    linears, x = [nn.Linear(8, 3), nn.Linear(8, 4, bias=False)], gaussian(16, 5 if isinstance(before, nn.Linear) else 8)
    expected = [linear(before(x)) for linear in linears]
    scale = torch.linspace(0.1, 7, 8)
    weight = before.weight.detach().clone()
    fold_scales_(before, linears, scale)

    torch.testing.assert_close([linear(before(x)) for linear in linears], expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before.weight, weight)


def test_fewer_key_value_heads_leave_the_output_projection_alone():
    """With v narrower than o there is no scale of its own for each column, so that group is left out."""
    groups = dict(llama_groups(nn.ModuleList([Block(narrow=32)])))

    assert "0.self_attn.v_proj" not in groups
    assert groups["0.input_layernorm"] == [f"0.self_attn.{n}_proj" for n in "qkv"]


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + weight, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, K]."""
        return nn.functional.rms_norm(x, (8,)) * (1 + self.weight)


def test_what_cannot_take_a_scale_is_refused_unchanged():
    """Norms that use their weight otherwise, or have none, shapes and scales that do not fit: refused, untouched."""
    linear, scale = nn.Linear(8, 4), torch.linspace(0.5, 2, 8)
    weight, norm = linear.weight.detach().clone(), OnePlus()
    for before, factor, complaint in [
        (norm, scale, "does not multiply its output by its weight"),
        (nn.LayerNorm(8, elementwise_affine=False), scale, "has no weight to fold"),
        (nn.LayerNorm(8), scale[:4], "does not fit"),
        (nn.Linear(8, 6), scale, "no output of 8 channels"),
        (nn.LayerNorm(8), -scale, "positive and finite"),
    ]:
        with pytest.raises(UnsupportedError, match=complaint):
            fold_scales_(before, [linear], factor)
    quantized = nn.Sequential(nn.Linear(8, 8))
    quantize_(quantized, "int8")
    with pytest.raises(UnsupportedError, match="fold before quantizing"):
        fold_scales_(nn.LayerNorm(8), [quantized[0]], scale)

    assert torch.equal(linear.weight, weight)
    assert torch.equal(norm.weight, torch.full((8,), 0.3))


def test_missing_facts_are_named(block):
    """Groups without statistics, unknown modules and a model without known groups: one clear error each."""
    known = observed(block, gaussian(64, K))
    with pytest.raises(SolverError, match="post_attention_layernorm: nothing is known"):
        smooth_(block, {k: v for k, v in known.items() if "mlp" not in k or "down" in k}, "int8")
    with pytest.raises(UnsupportedError, match="no module 'norm'"):
        smooth_(block, known, "int8", [("norm", ["mlp.down_proj"])])
    with pytest.raises(SolverError, match="give groups"):
        smooth_(nn.Sequential(nn.Linear(4, 4)), {}, "int8")
