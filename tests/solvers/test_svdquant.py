"""svdquant: W4A4 layers fitted to their input, with its activations quantized as the runtime does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from lowbit.errors import SolverError, WeightError
from lowbit.formats import Format, parse_spec
from lowbit.numerics.int4_matmul import round_groups, rounded_input
from lowbit.numerics.w4a4_search import lost_to_lowest
from lowbit.solvers import Statistics, solve, solver
from lowbit.solvers.svdquant import svdquant, svdquant_shared
from lowbit.solvers.svdquant_low_rank import low_rank
from tests.support import gaussian

K, N, TOKENS = 256, 192, 2048
FMT = parse_spec("svdquant_w4a4(rank=16)")


def power_law(tokens: int, seed: int, k: int = K) -> Tensor:
    """Inputs [tokens, k] whose second moments fall as 1 / i, with every 37th channel twenty times as large."""
    basis = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(7))).Q
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, k + 1) ** -0.5
    return (x @ basis) * torch.where(torch.arange(k) % 37 == 0, 20.0, 1.0)


def seen(x: Tensor) -> Statistics:
    """The statistics of some inputs, half of them held out."""
    first, other = x.chunk(2)
    return Statistics(
        hessian=first.t() @ first / len(first), tokens=len(first), held_out=other.t() @ other / len(other),
        held_out_tokens=len(other), absmax=x.abs().amax(0), mean=x.mean(0), minimum=x.amin(0), maximum=x.amax(0),
        samples=first[:256],
    )  # fmt: skip


def gained(fmt: Format, parts: dict[str, Tensor], w: Tensor, x: Tensor) -> float:
    """The signal-to-noise ratio in dB of the layer's output on x, activations quantized."""
    share = fmt.bias_share(parts)
    found = fmt.linear(x, parts, None if share is None else -share)
    wanted = (x @ w.t()).double()
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics, Tensor]:
    """A weight, the statistics of its input and fresh inputs."""
    return gaussian(N, K), seen(power_law(TOKENS, 1)), power_law(512, 2)


def test_beats_plain_rounding_and_the_data_free_fit(layer):
    """On fresh inputs with outlier channels the gain is 8 dB over plain W4A4 and 5 dB over the data-free fit."""
    w, known, x = layer
    wanted, ones = x @ w.t(), torch.ones(K)
    plain = rounded_input(x, ones, unsigned=False) @ round_groups(w).t()
    rounded = 10 * math.log10(float(wanted.square().sum() / (plain - wanted).square().sum()))
    fitted = gained(FMT, solver("svdquant")(w, FMT, known), w, x)

    assert fitted > rounded + 8
    assert fitted > gained(FMT, solver("scale_search")(w, FMT, known), w, x) + 5


def test_refinements_gain_on_top(layer):
    """`auto` takes svdquant, gptq and descent, which is better than svdquant alone, and the result is kept."""
    w, known, x = layer
    solution = solve(w, FMT, "auto", known)

    assert solution.solver == "svdquant+gptq+descent"
    assert gained(FMT, solution.parts, w, x) > gained(FMT, svdquant(w, FMT, known), w, x) + 0.2


def test_refining_the_low_rank_lowers_the_weight_error(layer):
    """Turns of rounding and least squares lower the error of the weight under H, against none by more than 0.3 dB."""
    w, known, _ = layer
    hessian, noise = known.hessian + torch.eye(K) * 0.01, torch.full((K,), 0.01)
    errors = []
    for turns in (0, 6):
        up, down = low_rank(w, hessian, noise, 16, turns)
        residual = w - up @ down.t()
        error = torch.empty_like(residual)
        lost_to_lowest(residual, residual.clone(), error)
        errors.append(float(((error @ hessian) * error).sum()))

    assert errors[1] < errors[0] * 10**-0.03


def test_a_weight_of_the_rank_needs_nothing_of_the_four_bits():
    """A weight of rank 16 is held by the low rank alone: 35 dB, where four bits give 20."""
    w = gaussian(N, 16) @ gaussian(16, K, seed=1)
    x = power_law(TOKENS, 1)

    assert gained(FMT, svdquant(w, FMT, seen(x)), w, power_law(256, 2)) > 35


@pytest.mark.parametrize("lacking", [("samples",), ("held_out",), ("samples", "held_out", "absmax")])
def test_less_knowledge_still_helps(layer, lacking):
    """Without samples or a second half it stays within 1.5 dB of the full result."""
    w, known, x = layer
    full = gained(FMT, svdquant(w, FMT, known), w, x)

    assert gained(FMT, svdquant(w, FMT, replace(known, **dict.fromkeys(lacking))), w, x) > full - 1.5


def test_a_diagonal_is_enough_for_most(layer):
    """With E[x_k^2] alone it beats the data-free fit by 4 dB."""
    w, known, x = layer
    diagonal = Statistics(hessian=known.hessian.diagonal().clone(), tokens=known.tokens)

    assert gained(FMT, svdquant(w, FMT, diagonal), w, x) > gained(FMT, solver("scale_search")(w, FMT), w, x) + 4


@pytest.mark.parametrize("known", [None, Statistics(), Statistics(hessian=torch.zeros(K, K), tokens=9)])
def test_without_second_moments_it_is_the_data_free_fit(known):
    """Nothing known, or an input of nothing but zeros, gives what scale_search gives."""
    w = gaussian(64, K)
    wanted, found = solver("scale_search")(w, FMT), svdquant(w, FMT, known)

    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_shared_weights_share_smoothing_and_proj_down(layer):
    """Three weights get one smooth_factor and one proj_down, and lose less than 2.5 dB against one each."""
    _, known, x = layer
    weights = [gaussian(n, K, seed=n) for n in (192, 64, 128)]
    parts = svdquant_shared(weights, FMT, known)

    for w, made in zip(weights, parts, strict=True):
        FMT.check(made, tuple(w.shape))
        assert torch.equal(made["smooth_factor"], parts[0]["smooth_factor"])
        assert torch.equal(made["proj_down"], parts[0]["proj_down"])
        assert gained(FMT, made, w, x) > gained(FMT, svdquant(w, FMT, known), w, x) - 2.5


def test_weights_that_cannot_share_are_refused(layer):
    """Different K, different dtypes and statistics without second moments are named."""
    _, known, _ = layer
    w = gaussian(64, K)
    for other in (gaussian(64, 2 * K), w.bfloat16()):
        with pytest.raises(SolverError, match=r"qkv: weights that share proj_down need one K, one dtype"):
            svdquant_shared([w, other], FMT, known, where="qkv")
    with pytest.raises(SolverError, match=r"qkv: svdquant needs second moments"):
        svdquant_shared([w], FMT, Statistics(), where="qkv")


def test_other_formats_and_other_layers_are_refused(layer):
    """A format without a low-rank branch and statistics of another K give one clear error."""
    w, known, _ = layer
    with pytest.raises(SolverError, match=r"fc1: nvfp4 has no low-rank branch"):
        svdquant(w, parse_spec("nvfp4"), known, where="fc1")
    with pytest.raises(SolverError, match=r"fc1: the statistics are for K = 256, the weight has K = 128"):
        svdquant(gaussian(64, 128), FMT, known, where="fc1")


def test_unsigned_activations_gain_after_a_gelu():
    """After a GELU unsigned codes fit and beat signed ones by 1 dB; they do not fit an input with both signs."""
    x = gelu(power_law(TOKENS + 512, 1) * 2)
    known, w, signed = seen(x[:TOKENS]), gaussian(N, K), seen(power_law(64, 3))
    unsigned = parse_spec("svdquant_w4a4(rank=16,act_unsigned=True)")
    results = [gained(fmt, svdquant(w, fmt, known), w, x[TOKENS:]) for fmt in (FMT, unsigned)]

    assert known.minimum is not None
    assert signed.minimum is not None
    assert FMT.fitted_to(float(known.minimum.min())) == unsigned
    assert FMT.fitted_to(float(signed.minimum.min())) == FMT
    assert results[1] > results[0] + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_have_the_dtype_of_the_weight(layer, dtype):
    """Factors and scales are stored as the format says for the weight's dtype, and the same input gives the same."""
    w, known, _ = layer
    parts, again = (svdquant(w.to(dtype), FMT, known) for _ in range(2))

    FMT.check(parts, (N, K))
    assert {name: value.dtype for name, value in parts.items()} == FMT.part_dtypes(dtype)
    assert all(torch.equal(parts[name], again[name]) for name in parts)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e18])
def test_any_size_of_weight(layer, size):
    """Zeros decode to zeros, and weights whose squares leave float32 are fitted as well as others."""
    w, known, x = layer
    parts = svdquant(w * size, FMT, known)

    if not size:
        assert not FMT.dequantize(parts, (N, K), torch.float32).any()
    elif size > 1:
        assert gained(FMT, parts, w * 1e18, x) > gained(FMT, svdquant(w, FMT, known), w, x) - 0.1


def test_a_weight_too_large_for_float16_factors_is_refused(layer):
    """proj_up of a float16 weight near its limit would be infinite: an error with the layer's name, no infinity."""
    _, known, _ = layer
    w = torch.full((N, K), 6e4, dtype=torch.float16)
    with pytest.raises(WeightError, match=r"fc1: its low-rank factors exceed float16"):
        svdquant(w, FMT, known, where="fc1")
