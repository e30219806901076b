"""quantize and scale_search for GGUF blocks of one step, or a step and a zero: Q4_0 to Q8_0 and MXFP4.

Plain blocks are the reference's, byte for byte. Searched ones lose as much as the reference's: which of two steps is
better within float32's error, the order of sums decides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import select, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.numerics.gguf_encode import AS_GGML
from lowbit.ops.encode import encode, encode_searched
from tests.support import gaussian, outlier_weight

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

EVERY_TYPE = pytest.mark.parametrize("name", AS_GGML)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 32), (3, 96), (17, 64), (37, 544))  # of blocks that no vector divides
ALIKE = 5e-4  # of the error of some thousand blocks
_STEPS_BELOW = (0, 1, 2, 3, 5, 6, 11, 12, 22, 23, 44, 45)  # the last place of float32 from a power of two


def of(name: str) -> Format:
    """The format of a type."""
    return parse_spec(f"gguf(type={name})")


def searched(fmt: Format, w: Tensor, weights: Tensor | None = None, backend: str = "cpu") -> Parts:
    """By the kernel, or by the reference."""
    with use_backend(backend):
        return encode_searched(w, fmt, weights)


def column_weights(columns: int) -> Tensor:
    """Over three decades, in no order, some of them zero."""
    weights = torch.logspace(-1.5, 1.5, columns)[torch.arange(columns) * 37 % columns]
    weights[::7] = 0
    return weights


def values(fmt: Format, parts: Parts, w: Tensor) -> Tensor:
    """What the blocks mean."""
    return fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32)


def lost(fmt: Format, w: Tensor, parts: Parts, weights: Tensor | None = None) -> Tensor:
    """The squared error of each row, columns by their weights."""
    error = (values(fmt, parts, w).double() - w.double()).square()
    return (error if weights is None else error * weights).sum(1)


def awkward() -> Tensor:
    """Rows of every size that float32 has, of zeros, one value, one sign, whole numbers, ties and powers of two."""
    w = outlier_weight(96, 128) * torch.logspace(-44, 38, 96, dtype=torch.float64).float().unsqueeze(1)
    w = w.clamp(-3e38, 3e38)
    generator = torch.Generator().manual_seed(4)
    special = gaussian(16, 128)
    special[0], special[1], special[2] = 0.0, -0.0, 3.7
    special[3] = torch.where(torch.rand(128, generator=generator) < 0.5, 0.0, -0.0)
    special[4, 1:], special[5, :-1] = 0, 0
    special[6], special[7] = special[6].abs(), -special[7].abs()
    special[8] = torch.randint(-8, 9, (128,), generator=generator).float()
    special[9] = torch.randint(-24, 25, (128,), generator=generator).float() / 4
    special[10] = 2.0 ** torch.randint(-20, 4, (128,), generator=generator).float()
    special[11] = torch.nextafter(special[10], torch.zeros(()))
    special[12] = torch.where(torch.arange(128) % 32 == 5, 7e4, special[12])
    special[13] = 5 + 0.1 * special[13]
    special[14] = 1e6 + special[14]
    special[15, ::2] = -special[15, 1::2]
    return torch.cat([w, special])


@EVERY_TYPE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_blocks_are_those_of_the_reference(name, dtype):
    """Byte for byte: of usual weights in odd shapes, and of whatever else is finite."""
    fmt = of(name)
    rows = awkward().to(dtype)
    rows = rows[rows.isfinite().all(1)]
    for w in (*(outlier_weight(*shape).to(dtype) for shape in SHAPES), rows):
        with use_backend("cpu"):
            found = encode(w, fmt)["qdata"]
        assert torch.equal(found, fmt.quantize(w)["qdata"])


def test_scales_of_mxfp4_just_below_powers_of_two():
    """Where float32 has the logarithm of a value as whole, the scale is that of the power, for every exponent."""
    fmt, powers = of("MXFP4"), 2.0 ** torch.arange(-126.0, 128.0, dtype=torch.float64).float()
    bits = powers.view(torch.int32).unsqueeze(1) - torch.tensor(_STEPS_BELOW, dtype=torch.int32)
    w = torch.zeros(bits.numel(), 32)
    w[:, 7] = bits.view(torch.float32).flatten()
    with use_backend("cpu"):
        assert torch.equal(encode(w, fmt)["qdata"], fmt.quantize(w)["qdata"])


@EVERY_TYPE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_more_is_lost_than_by_the_reference(name, dtype):
    """With weights of columns and without, in all, and less than by plain rounding."""
    fmt = of(name)
    for w in (gaussian(256, 512).to(dtype), outlier_weight(256, 512).to(dtype)):
        for weights in (None, column_weights(512)):
            plain = float(lost(fmt, w, fmt.quantize(w), weights).sum())
            mine, other = (
                float(lost(fmt, w, searched(fmt, w, weights, backend), weights).sum()) for backend in ("cpu", "eager")
            )
            assert mine <= other * (1 + ALIKE)
            assert mine < 0.97 * plain


@EVERY_TYPE
def test_shapes_that_no_vector_divides(name):
    """Blocks at the end of a weight are as good as others, and each gets the weights of its own columns."""
    fmt = of(name)
    for shape in SHAPES:
        w, weights = outlier_weight(*shape), column_weights(shape[1])
        for known in (None, weights):
            mine, other = (lost(fmt, w, searched(fmt, w, known, backend), known) for backend in ("cpu", "eager"))
            assert bool((mine <= other * 1.05).all())
            assert float(mine.sum()) <= float(other.sum()) * 1.01


@EVERY_TYPE
def test_whatever_is_finite_is_searched(name):
    """Zeros, tiny, huge and equal values: what is made of them is finite, and no row loses more than plain."""
    fmt, w = of(name), awkward()
    plain = fmt.quantize(w)
    for weights in (None, column_weights(128)):
        parts = searched(fmt, w, weights)
        assert values(fmt, parts, w).isfinite().all()
        heavy = torch.ones(128) if weights is None else weights.clamp_min(1e-4)
        before = lost(fmt, w, plain, heavy)
        energy = (w.double().square() * heavy).sum(1)
        # A zero of weight counts a little, and a sum of squares has the bits of float32.
        assert bool((lost(fmt, w, parts, heavy) <= before * 1.001 + 1e-9 * energy).all())
    assert bool((values(fmt, searched(fmt, w), w)[96:98] == 0).all())


@EVERY_TYPE
def test_codes_are_the_nearest_under_what_is_stored(name):
    """Encoding the weight again under the headers gives the same bytes."""
    fmt, w = of(name), torch.cat([outlier_weight(24, 512), awkward().repeat(1, 4)])
    for weights in (None, column_weights(512)):
        parts = searched(fmt, w, weights)
        assert torch.equal(values(fmt, fmt.quantize(w, params=parts), w), values(fmt, parts, w))


@EVERY_TYPE
def test_weights_that_say_nothing_change_nothing(name):
    """All the same, however large; and all zero, which is none."""
    fmt, w = of(name), gaussian(40, 256)
    same = searched(fmt, w)
    for size in (1.0, 2.0**100, 2.0**-100):
        assert torch.equal(searched(fmt, w, torch.full((256,), size))["qdata"], same["qdata"])
    nothing = searched(fmt, w, torch.zeros(256))
    assert float(lost(fmt, w, nothing).sum()) <= float(lost(fmt, w, same).sum()) * (1 + ALIKE)


@EVERY_TYPE
def test_blocks_do_not_depend_on_their_neighbours_or_threads(name):
    """A row alone and among many, on one thread and two, becomes the same bytes."""
    fmt, w, weights = of(name), torch.cat([awkward()[:, :96], outlier_weight(2100, 96)]), column_weights(96)
    with use_backend("cpu"):
        plain, found = encode(w, fmt)["qdata"], encode_searched(w, fmt, weights)["qdata"]
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2 if before == 1 else 1)
            assert torch.equal(encode(w, fmt)["qdata"], plain)
            assert torch.equal(encode_searched(w, fmt, weights)["qdata"], found)
        finally:
            torch.set_num_threads(before)
        for row in (0, 15, 96, 99, 2195):
            assert torch.equal(encode(w[row : row + 1], fmt)["qdata"][0], plain[row])
            assert torch.equal(encode_searched(w[row : row + 1], fmt, weights)["qdata"][0], found[row])


@EVERY_TYPE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(name, bad):
    """In the first block as in the last, of 16 bits as of 32."""
    for place in ((0, 0), (18, 95)):
        for dtype in DTYPES:
            w = gaussian(19, 96).to(dtype)
            w[place] = bad
            for make in (encode, encode_searched):
                with pytest.raises(WeightError, match=r"blocks\.3: holds NaN or infinity"), use_backend("cpu"):
                    make(w, of(name), where="blocks.3")


@EVERY_TYPE
def test_a_weight_with_gaps_is_made_as_one_without(name):
    """Transposed, every other row, some columns, one row many times, and weights of columns in float64 with gaps."""
    fmt, base, weights = of(name), outlier_weight(96, 192), column_weights(384).double()[::2]
    for w in (base.t(), base[::3, 64:160], base[:1].expand(5, 192), base[1:, 1:97]):
        whole, counts = w.clone(memory_format=torch.contiguous_format), weights[: w.shape[1]]
        with use_backend("cpu"):
            assert torch.equal(encode(w, fmt)["qdata"], fmt.quantize(whole)["qdata"])
        assert torch.equal(searched(fmt, w, counts)["qdata"], searched(fmt, whole, counts.float().clone())["qdata"])


@EVERY_TYPE
@pytest.mark.parametrize("shape", [(1,), (5,), (512,), (4, 256)])
def test_weights_that_are_not_one_a_column_are_left_to_the_reference(name, shape):
    """The kernel reads K of them, whatever is behind fewer; the reference spreads them, or says that it cannot."""
    args = (of(name), gaussian(4, 256), torch.ones(shape), "weight")
    assert select("scale_search", "gguf", "", "cpu", args).backend == "eager"
