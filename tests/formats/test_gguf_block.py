"""GGUF blocks against the gguf package: decoding equal bit for bit, and encoding where it has an encoder."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError, WeightError
from lowbit.formats import Format, parse_spec
from lowbit.formats.gguf_recast import SAME_CODES, block_format, put_together
from lowbit.numerics.gguf_blocks import GGML_TYPES, READABLE
from lowbit.numerics.gguf_encode import AS_GGML, WRITABLE
from lowbit.solvers.base import Statistics
from lowbit.solvers.solve import solve
from tests.support import gaussian, outlier_weight, sqnr

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
np = pytest.importorskip("numpy")


def of(name: str) -> Format:
    """The format of a type."""
    return parse_spec(f"gguf(type={name})")


def awkward(rows: int = 64, columns: int = 512) -> torch.Tensor:
    """Weights of many sizes, with rows of ties, of zeros, of powers of two and of equal magnitudes of either sign."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn((rows, columns), generator=generator) * torch.randn((rows, 1), generator=generator).mul(3).exp()
    w[5] = 0
    w[6] = (w[6] * 4).round() / 4 + 0.0  # of zeros of either sign, which one is the least is up to the processor
    w[7] = torch.randint(-8, 9, (columns,), generator=generator).float()
    w[8] = 2.0 ** torch.randint(-20, 4, (columns,), generator=generator).float()
    w[9] = torch.nextafter(w[8], torch.zeros(()))
    w[10] = -w[8]
    w[11, ::2] = -w[11, 1::2]
    w[12] = torch.randint(-24, 25, (columns,), generator=generator).float() / 4
    return w


def test_sizes_are_those_of_the_package():
    """The one table of types has the numbers, names, columns and bytes of the gguf package."""
    for kind, (columns, size) in gguf.GGML_QUANT_SIZES.items():
        assert GGML_TYPES[int(kind)] == (kind.name, columns, size)


@pytest.mark.parametrize("name", READABLE)
def test_any_bytes_decode_as_the_package_decodes_them(name):
    """Random blocks, scales that are infinite or subnormal among them, have exactly the values of gguf.dequantize."""
    fmt = of(name)
    raw = np.random.default_rng(0).integers(0, 256, (50, fmt.nbytes(1, 1024)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])

    found = fmt.dequantize({"qdata": torch.from_numpy(raw)}, (50, 1024), torch.float32).numpy()

    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert (found.view(np.int32) == expected.view(np.int32))[~nan].all()


@pytest.mark.parametrize("name", AS_GGML)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_those_of_the_package(name, dtype):
    """quantize makes the very bytes of gguf.quantize, at ties, zeros and powers of two as well."""
    w = awkward().to(dtype)

    expected = gguf.quantize(w.float().numpy(), gguf.GGMLQuantizationType[name])

    assert np.array_equal(of(name).quantize(w)["qdata"].numpy(), expected)


def test_a_global_scale_multiplies():
    """NVFP4 weights with a stored scale for the tensor are the values of the blocks times that."""
    plain, scaled = of("NVFP4"), parse_spec("gguf(type=NVFP4,global_scale=true)")
    raw = torch.randint(0, 256, (3, plain.nbytes(1, 128)), dtype=torch.uint8)

    found = scaled.dequantize({"qdata": raw, "global_scale": torch.tensor(0.375)}, (3, 128), torch.float32)

    assert torch.equal(found, plain.dequantize({"qdata": raw}, (3, 128), torch.float32) * 0.375)


@pytest.mark.parametrize("name", WRITABLE)
def test_second_moments_help(name):
    """The refinements work on blocks: with correlated inputs they lose less of the output than rounding does."""
    w = outlier_weight(32, 256)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1)) @ gaussian(256, 256, seed=2)
    halves = [half.t() @ half / 512 for half in x.split(512)]
    statistics = Statistics(hessian=halves[0], tokens=512, held_out=halves[1], held_out_tokens=512)

    solution = solve(w, of(name), "rtn+gptq+descent", statistics)

    assert solution.solver == "rtn+gptq+descent"
    assert solution.error < 0.9 * solution.rtn_error


def test_huge_weights_saturate():
    """A step that float16 cannot hold becomes the largest it can, not an infinity."""
    fmt, w = of("Q8_0"), torch.full((1, 32), 1e9)

    assert fmt.dequantize(fmt.quantize(w), (1, 32), torch.float32)[0, 0] == 65504.0 * 127


def test_spec_names_its_type():
    """The spec always says which type, the default one too, and other fields go with it."""
    assert parse_spec("gguf").spec == "gguf(type=Q8_0)"
    assert parse_spec("gguf(pre_quant_scale=true)").spec == "gguf(type=Q8_0,pre_quant_scale=True)"
    assert of("Q4_K").spec == "gguf(type=Q4_K)"


def test_what_is_wrong_is_named():
    """Unknown types, a scale of the tensor, widths that blocks do not divide, and types for reading only."""
    with pytest.raises(FormatError, match="type is 'IQ2_S', expected one of Q4_0, Q4_1"):
        of("IQ2_S")
    with pytest.raises(FormatError, match="can only be read"):
        parse_spec("gguf(type=Q4_0,global_scale=true)").quantize(gaussian(4, 64))
    with pytest.raises(WeightError, match="has 40 columns, not a multiple of the 32 of a Q4_0 block"):
        of("Q4_0").quantize(gaussian(4, 40))
    with pytest.raises(FormatError, match=r"proj: gguf\(type=NVFP4,global_scale=True\) can only be read.*or to nvfp4"):
        parse_spec("gguf(type=NVFP4,global_scale=true)").quantize(gaussian(4, 256), where="proj")
    with pytest.raises(WeightError, match="not a multiple of the 256 of a Q4_K block; those of Q4_0 have 32"):
        of("Q4_K").quantize(gaussian(4, 288))


def test_values_near_a_weight_come_back_under_its_scales():
    """Rounding under the scales of given blocks works for the types that are for reading only, too."""
    fmt = of("Q6_K")
    raw = torch.randint(0, 256, (4, fmt.nbytes(1, 256)), dtype=torch.uint8) & 0x3F
    w = fmt.dequantize({"qdata": raw}, (4, 256), torch.float32)
    step = fmt.scales({"qdata": raw}).abs().repeat_interleave(16, dim=1)

    moved = fmt.project(w + 0.4 * step, {"qdata": raw})

    assert sqnr(w, moved) == float("inf") or torch.equal(moved, w)


@pytest.mark.parametrize("name", SAME_CODES)
def test_other_formats_hold_the_same_codes(name):
    """Recast to the format of the same codes, blocks keep their values; and nothing else is promised."""
    fmt = of(name)
    raw = torch.randint(0, 256, (6, fmt.nbytes(1, 256)), dtype=torch.uint8) & 0xBF
    values = fmt.dequantize({"qdata": raw}, (6, 256), torch.float32)

    for other in fmt.equivalents():
        parts = fmt.recast({"qdata": raw}, other)
        other.check(parts, (6, 256))
        assert torch.equal(other.dequantize(parts, (6, 256), torch.float32), values)
    with pytest.raises(FormatError, match="quantize again"):
        fmt.recast({"qdata": raw}, parse_spec("int8"))


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4"])
def test_blocks_are_put_together(spec):
    """mxfp4 and nvfp4 weights become blocks with their codes, and come back from them bit for bit."""
    fmt, w = parse_spec(spec), outlier_weight(5, 192)
    parts = fmt.quantize(w)
    blocks = block_format(fmt, (5, 192))
    made = put_together(fmt, parts, (5, 192), "w")
    blocks.check(made, (5, 192))
    back = blocks.recast(made, fmt)

    assert sqnr(fmt.dequantize(parts, (5, 192), torch.float32), blocks.dequantize(made, (5, 192), torch.float32)) > 120
    for part, tensor in parts.items():
        assert torch.equal(raw_view(tensor), raw_view(back[part]))
    assert block_format(fmt, (5, 80)) is None


def raw_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of some axes."""
    return tensor.view(torch.uint8) if tensor.dim() else tensor
