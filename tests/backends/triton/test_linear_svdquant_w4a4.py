from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import svdquant_fragments, svdquant_tiles
from tests.support.cpu_linear import activations, packed_weight
from tests.support.triton_linear import DEVICE, DTYPES, check_linear, check_properties, require

require()

svdquant_gemm = pytest.importorskip("lowbit.backends.triton.svdquant_gemm")
linear = torch.nn.functional.linear


def eager_linear(spec, n, k):
    """What eager makes of a weight's parts: (x, weight) -> float64, as `check_linear` takes it."""
    packed, _ = packed_weight(spec, n, k, "")
    return lambda x, _: parse_spec(spec).linear(x.float(), packed.parts, None).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
def test_product(unsigned, dtype):
    """The product is eager's for odd numbers of rows, tokens and groups, signed and unsigned."""
    for n, k, rank in ((1, 64, 1), (15, 192, 3), (100, 320, 40)):
        spec = f"svdquant_w4a4(rank={min(rank, n)},act_unsigned={unsigned})"
        check_linear(spec, n, k, 3, dtype, layout="", reference=eager_linear(spec, n, k))
    spec = f"svdquant_w4a4(rank=5,act_unsigned={unsigned})"
    reference = eager_linear(spec, 35, 128)
    for m in (1, 17, 70):
        check_linear(spec, 35, 128, m, dtype, layout="", bias=m % 2 == 0, reference=reference)


@pytest.mark.parametrize("rank", [1, 16, 32, 48, 128, 150])
def test_ranks(rank):
    """The product is eager's whatever the rank: less than a tile, several, more than one program projects down to."""
    spec = f"svdquant_w4a4(rank={rank})"
    reference = eager_linear(spec, 160, 192)
    for dtype in (torch.float16, torch.float32):
        check_linear(spec, 160, 192, 5, dtype, layout="", reference=reference)


@pytest.mark.parametrize("spec", ["svdquant_w4a4(rank=8)", "svdquant_w4a4(rank=2,act_unsigned=true)"])
def test_properties(spec):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(spec, 20, 64, layout="")


def test_what_another_kernel_packed():
    """A weight that was packed for a kernel that refuses the call gives the bits of the plain one."""
    packed, _ = packed_weight("svdquant_w4a4(rank=6)", 70, 128, "")
    packed = packed.to(DEVICE)
    other = packed.in_layout(svdquant_fragments.NAME)
    x = activations(3, 128, torch.float32).to(DEVICE)
    with use_backend("triton"), torch.inference_mode():
        wanted = linear(x, packed)
    entry = select("linear", "svdquant_w4a4", other.kernel_layout, DEVICE.type, (other.format, x, other.parts, None))
    assert entry.backend == "triton"
    with torch.inference_mode():  # not forced: eager unpacks
        assert torch.equal(linear(x, other), wanted)


@pytest.mark.parametrize("unsigned", [False, True])
def test_tiles_give_the_same_bits(unsigned):
    """A weight in kitchen's tiles gives the bits of the plain one."""
    packed, _ = packed_weight(f"svdquant_w4a4(rank=6,act_unsigned={unsigned})", 128, 128, "")
    packed = packed.to(DEVICE)
    tiled = packed.in_layout(svdquant_tiles.NAME)
    for m in (1, 20):
        x = activations(m, 128, torch.float16).to(DEVICE)
        with use_backend("triton"), torch.inference_mode():
            assert torch.equal(linear(x, tiled), linear(x, packed))


def test_parts_of_16_bits():
    """Parts in bfloat16, which the interpreter can read, and parts in the dtype of x give eager's product."""
    packed, _ = packed_weight("svdquant_w4a4(rank=20)", 40, 256, "")
    fmt = parse_spec("svdquant_w4a4(rank=20)")
    for kind in (torch.bfloat16, torch.float16):
        parts = {
            name: part.to(kind).to(DEVICE) if part.is_floating_point() else part.to(DEVICE)
            for name, part in packed.parts.items()
        }
        x = activations(7, 256, torch.float16).to(DEVICE)
        entry = select("linear", fmt.name, "", DEVICE.type, (fmt, x, parts, None))
        assert entry.backend == "triton"
        wanted = fmt.linear(x.float(), parts, None).double()
        assert (entry.run(fmt, x, parts, None).double() - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("offset", range(4), ids=["converted", "multiplied", "started", "halves"])
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_largest_sums_are_exact(unsigned, offset, monkeypatch):
    """All codes of a group at their ends: no sum leaves its integers, whichever way it becomes a float."""
    monkeypatch.setattr(svdquant_gemm, "offset_of", lambda _: offset)
    fmt, ones = parse_spec(f"svdquant_w4a4(rank=1,act_unsigned={unsigned})"), torch.ones(128)
    for code in (0x77, -0x78, 0x78, -0x79):  # nibbles 7 and 7, -8 and -8, 7 and -8, -8 and 7
        parts = {
            "qdata": torch.full((16, 64), code, dtype=torch.int8),
            "scale": torch.full((2, 16), 0.37),
            "smooth_factor": ones,
            "proj_down": torch.zeros(128, 1),
            "proj_up": torch.zeros(16, 1),
        }
        alternating = ones.clone()
        alternating[1::2] = -1
        x = torch.stack([ones, -ones, alternating, -alternating])
        moved = {name: part.to(DEVICE) for name, part in parts.items()}
        entry = select("linear", fmt.name, "", DEVICE.type, (fmt, x.to(DEVICE), moved, None))
        assert entry.backend == "triton"
        found = entry.run(fmt, x.to(DEVICE), moved, None)
        torch.testing.assert_close(found.cpu(), fmt.linear(x, parts, None), rtol=1e-6, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_what_is_not_finite_stays_so():
    """A NaN or an infinity among the activations reaches every output of its token and no other token's."""
    packed, _ = packed_weight("svdquant_w4a4(rank=2)", 20, 128, "")
    x = activations(3, 128, torch.float32)
    x[0, 5], x[2, 70] = torch.nan, torch.inf
    with use_backend("triton"), torch.inference_mode():
        found = linear(x.to(DEVICE), packed.to(DEVICE)).cpu()

    assert not found[[0, 2]].isfinite().any()
    assert found[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
def test_large(unsigned, dtype):
    """Shapes of real layers give eager's product, for numbers of tokens on both sides of every crossover."""
    spec = f"svdquant_w4a4(rank=32,act_unsigned={unsigned})"
    reference = eager_linear(spec, 6144, 3072)
    for m in (1, 7, 16, 33, 100, 300, 1500):
        check_linear(spec, 6144, 3072, m, dtype, layout="", reference=reference)
