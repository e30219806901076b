"""quantize for w4a8_codebook on the CPU backend: the bits of the reference where rotating is exact, and its error."""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, select, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Parts, parse_spec
from lowbit.formats.w4a8_codebook import W4A8Codebook
from lowbit.numerics.codebooks import gaussian_codebook
from lowbit.numerics.rotations import regular_hadamard, rotate_groups
from lowbit.ops.encode import encode, encode_searched
from tests.support import outlier_weight

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SPECS = (
    "w4a8_codebook",
    "w4a8_codebook(rotation=1024)",
    "w4a8_codebook(codebook=False)",
    "w4a8_codebook(bits=6,rotation=64,codebook=False)",
    "w4a8_codebook(bits=6,rotation=16,codebook=False,group_size=48)",
    "w4a8_codebook(rotation=16,correction=True)",
    "w4a8_codebook(rotation=16,codebook=False,correction=True)",
    "w4a8_codebook(rotation=16,group_size=4)",
    "w4a8_codebook(rotation=16,group_size=8,codebook=False,correction=True)",
    "w4a8_codebook(rotation=64,group_size=64)",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 16), (37, 48), (5, 192), (3, 1024), (19, 3072))
KINDS = ("usual", "tiny", "huge", "sparse")


def integers(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Small integers times a power of two, whose rotation is exact in float32 in whatever order it adds up."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    w = torch.randint(-8, 9, shape, generator=generator).float()
    w *= torch.randint(1, 5, (shape[0], 1), generator=generator)
    if kind == "tiny":
        w *= 2.0**-18
    if kind == "huge":
        w *= 2.0 ** (10 if dtype == torch.float16 else 110)
    if kind == "sparse":
        w[:, 5:] = 0
        w[::3] = 0
    return w.to(dtype)


def fitting(fmt: W4A8Codebook) -> list[tuple[int, int]]:
    """The shapes that a format can store."""
    return [shape for shape in SHAPES if fmt.check_shape(*shape) is None]


def both(w: torch.Tensor, fmt: W4A8Codebook) -> tuple[Parts, Parts]:
    """The parts that the kernel makes, and the reference's."""
    with use_backend("cpu"):
        return encode(w, fmt), fmt.quantize(w)


def bits(part: torch.Tensor) -> torch.Tensor:
    """A part as bytes, a row to each of its own."""
    return part.contiguous().view(-1).view(torch.uint8)


def check_choices(fmt: W4A8Codebook, w: torch.Tensor, found: Parts, wanted: Parts) -> None:
    """Every group has the reference's scale and codes, or another scale with the same error but for its rounding."""
    k = w.shape[1]
    scales = [parts["s_rel"].view(torch.uint8) for parts in (found, wanted)]
    same = scales[0] == scales[1]
    assert (~same).sum() <= 1 + same.numel() // 500
    codes = [fmt._groups(fmt.unpack(parts["qdata"], k)) for parts in (found, wanted)]
    assert torch.equal(codes[0][same], codes[1][same])
    if "correction" in wanted:  # a mean of a group, summed in another order: the next number of its dtype at most
        torch.testing.assert_close(
            found["correction"], wanted["correction"], rtol=2**-7, atol=1e-6 * float(w.abs().max())
        )
    if not bool(same.all()):
        rows = fmt.prepare(w.float()).double()
        errors = [
            fmt._groups((fmt.decode(fmt.unpack(parts["qdata"], k), parts) - rows).square()) for parts in (found, wanted)
        ]
        left = [error.sum(-1)[~same] for error in errors]
        torch.testing.assert_close(left[0], left[1], rtol=1e-2 if fmt.correction else 1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_bits_where_the_rotation_is_exact(spec, kind):
    """Codebook and row scales are the reference's to the bit; group scales and codes, too, but for equal errors."""
    fmt = parse_spec(spec)
    for shape in fitting(fmt):
        for dtype in DTYPES:
            w = integers(kind, shape, dtype)
            found, wanted = both(w, fmt)
            fmt.check(found, shape)
            assert set(found) == set(wanted)
            for name in ("s_channel", *(("codebook",) if fmt.codebook else ())):
                assert torch.equal(bits(found[name]), bits(wanted[name])), (shape, dtype, name)
            check_choices(fmt, w, found, wanted)


def test_a_fitted_codebook():
    """Where a table of the weight's own is worth it, the kernel takes that, whose levels need not be symmetric."""
    fmt = W4A8Codebook(rotation=16)
    rows = torch.tensor([-4.0, 0.0, 12.0, 16.0])[
        torch.randint(0, 4, (64, 256), generator=torch.Generator().manual_seed(0))
    ]
    w = rotate_groups(rows, 16)  # exact, and so is the way back
    found, wanted = both(w, fmt)
    assert not torch.equal(wanted["codebook"], gaussian_codebook(w.device))
    assert torch.equal(found["codebook"], wanted["codebook"])
    check_choices(fmt, w, found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_random_weights(spec, dtype):
    """Within the kernel's tolerance of the reference's values, and with its error to a part in ten thousand."""
    fmt, shape = parse_spec(spec), (48, 3072)
    generator = torch.Generator().manual_seed(1)
    for w in (
        torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape[0], 1, generator=generator)),
        outlier_weight(*shape).float(),
    ):
        source = w.to(dtype)
        entry = select("quantize", fmt.name, "", "cpu", (fmt, source, None, "weight"))
        found, wanted = (fmt.dequantize(parts, shape, torch.float32).double() for parts in both(source, fmt))
        assert entry.name == "cpu:quantize_w4a8_codebook"
        assert (found - wanted).norm() <= entry.tolerance * wanted.norm()
        assert (found - source).norm() <= (wanted - source).norm() * (1 + 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS)
def test_not_finite(spec, value):
    """NaN and infinity anywhere in a weight are the reference's error, which names the layer."""
    fmt = parse_spec(spec)
    shape = fitting(fmt)[-1]
    for dtype in DTYPES:
        for place in ((0, 0), (shape[0] - 1, shape[1] - 1)):
            w = integers("usual", shape, dtype)
            w[place] = value
            for make in (encode, encode_searched):
                with use_backend("cpu"), pytest.raises(WeightError, match=r"^blocks\.3: holds NaN or infinity"):
                    make(w, fmt, where="blocks.3")


@pytest.mark.parametrize("spec", SPECS)
def test_a_rotation_that_overflows_float32_is_an_error(spec):
    """Rotated values beyond float32 raise, with the layer's name, instead of giving NaN codes."""
    fmt = parse_spec(spec)
    k = fitting(fmt)[-1][1]
    w = 3e38 * regular_hadamard(16)[:2].sign().repeat(1, k // 16)
    with use_backend("cpu"), pytest.raises(WeightError, match=r"^blocks\.3: its rotated values exceed float32"):
        encode(w, fmt, where="blocks.3")


@pytest.mark.parametrize("spec", SPECS)
def test_threads_and_gaps(spec):
    """The number of threads and gaps between rows change no bit, and a search has nothing to add."""
    fmt, before = parse_spec(spec), torch.get_num_threads()
    w = outlier_weight(70, 6144)[:, :3072]
    with use_backend("cpu"):
        try:
            torch.set_num_threads(1)
            one = encode(w, fmt)
            torch.set_num_threads(2)
            two = encode_searched(w.contiguous(), fmt, torch.rand(3072))
        finally:
            torch.set_num_threads(before)
    for name, part in one.items():
        assert torch.equal(bits(part), bits(two[name])), name


@pytest.mark.parametrize(
    ("shape", "dtype", "seed", "reason"),
    [
        ((4, 256), torch.bfloat16, 1, "stochastic"),
        ((4, 256), torch.float64, None, "float64"),
        ((0, 256), torch.bfloat16, None, "empty"),
    ],
)
def test_refusals(shape, dtype, seed, reason):
    """What the kernel does not take is refused in words, and eager encodes it."""
    fmt, w = W4A8Codebook(), torch.ones(shape, dtype=dtype)
    said = explain("quantize", fmt.name, "", "cpu", (fmt, w, seed, "weight"))
    assert reason in said["cpu:quantize_w4a8_codebook"]
    found, wanted = encode(w, fmt, seed=seed), fmt.quantize(w, seed=seed)
    for name, part in wanted.items():
        assert torch.equal(bits(found[name]), bits(part)), name
