from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.numerics.int4_matmul import GELU_SHIFT, quantize_groups, unpack_codes
from lowbit.ops import quantize_svdquant_w4a4 as the_op
from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, relative_error

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, quantize_svdquant_w4a4 as cuda
from lowbit.backends.gpu import Target, assume

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GPU, SMALL = Target("cuda", (9, 0)), Target("cuda", (9, 0), 1)
QUOTIENTS = str(Path(__file__).parents[2] / "native" / "quotients.cu")
MANY = {16: cuda._Block(16, 2, 2, 2), 64: cuda._Block(64, 1, 4, 1)}  # blocks of many tokens


@pytest.fixture
def simulated(monkeypatch):
    """Launches run on a simulated GPU."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)


def operands(m: int, k: int, rank: int, dtype: torch.dtype = BF16, smooth: torch.dtype = BF16):
    """x with rows of zeros, tiny ones and quotients halfway between codes; factors, one of them 0; and proj_down."""
    generator = torch.Generator().manual_seed(m + k + rank)
    x, factor = activations(m, k, dtype), (torch.rand(k, generator=generator) + 0.5).to(smooth)
    down = torch.randn(k, rank, generator=generator).to(dtype)
    x[m // 2], x[m // 3], factor[k // 2 + 3] = 0, x[m // 3] * 1e-20, 0
    x[-1] = (x[-1] * 2).round()
    return x, factor, down


@pytest.mark.parametrize(
    ("m", "k", "rank", "dtype", "smooth", "pad_size", "unsigned", "apart"),
    [
        (1, 64, 3, BF16, BF16, 1, False, False),
        (17, 192, 11, F16, BF16, 1, True, True),
        (5, 640, 40, F16, F16, 32, True, False),
        (18, 128, 160, BF16, F32, 16, False, True),
    ],
)
def test_named_op(m, k, rank, dtype, smooth, pad_size, unsigned, apart, simulated):
    """Codes and scales have eager's bits, the low rank its values, and padded rows are 0, for all kinds of operands."""
    x, factor, down = operands(m, k, rank, dtype, smooth)
    raw = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype) if apart else None
    arguments = (x, factor, down, pad_size, unsigned, raw)
    with use_backend("eager"):
        wanted = the_op(*arguments)
    with assume(GPU):
        assert cuda.refuses_quantize(*arguments) is None
        found = cuda.quantize_svdquant_w4a4(*arguments)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert relative_error(found[2], wanted[2].double()) < 1e-5
    assert not found[2][m:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("m", [9, 700])
def test_large(m, unsigned):
    """On a GPU the bits are eager's for the shapes of real layers, too: its reciprocal is as near as it has to be."""
    x, factor, down = operands(m, 12288, 32)
    with use_backend("eager"):
        wanted = the_op(x, factor, down, 1, unsigned)
    with use_backend("cuda"):
        found = the_op(x.cuda(), factor.cuda(), down.cuda(), 1, unsigned)
    assert torch.equal(found[0].cpu(), wanted[0])
    assert torch.equal(found[1].cpu(), wanted[1])
    assert relative_error(found[2].cpu(), wanted[2].double()) < 1e-5


def stored(codes: torch.Tensor, storage: str) -> torch.Tensor:
    """Codes [Mp, K] -> the bytes that the definition of a storage asks for, each of them given once, flat."""
    (tokens, k), code = codes.shape, codes.int()
    token, column = torch.meshgrid(torch.arange(tokens), torch.arange(k), indexing="ij")
    group, c = column // 64, column % 64
    s = c // 2
    if storage == "fragments4":
        byte = token % 16 // 8 * 8 + c // 32 * 4 + c % 8 // 2
        at = (group * (tokens // 16) + token // 16) * 512 + (token % 8 * 4 + c // 8 % 4) * 16 + byte
        assert torch.equal(at[:, ::2], at[:, 1::2])
        at, code = at[:, ::2], code[:, ::2] & 15 | (code[:, 1::2] & 15) << 4
    elif storage == "fragments8":
        byte = (c % 2 * 2 + s // 16) * 4 + s % 4
        at = (group * (tokens // 8) + token // 8) * 512 + (token % 8 * 4 + s % 16 // 4) * 16 + byte
    else:
        b = c % 2 * 32 + s
        at = (group * tokens + token) * 64 + (b // 16 ^ token // 2 % 4) * 16 + b % 16
    out = torch.zeros(at.numel(), dtype=torch.uint8)
    assert torch.equal(at.flatten().sort().values, torch.arange(out.numel()))
    out[at.flatten()] = (code & 255).flatten().to(torch.uint8)
    return out


@pytest.mark.parametrize(
    ("m", "rank", "multiple", "unsigned", "target"),
    [(19, 16, 32, False, GPU), (70, 16, 16, True, SMALL), (40, 64, 64, False, SMALL)],
    ids=["few", "many", "long-rank"],
)
@pytest.mark.parametrize("storage", ["fragments4", "fragments8", "swizzled8"])
def test_storages(storage, m, rank, multiple, unsigned, target, simulated, monkeypatch):
    """Every byte is where the storage's definition says, padded tokens are 0, and splits of K add up."""
    k, shift = 320, GELU_SHIFT if unsigned else 0.0
    x, factor, down = operands(m, k, rank)
    if target is SMALL:
        monkeypatch.setattr(cuda, "_block", lambda *_: MANY[rank])
    with assume(target):
        codes, scale, low = cuda.quantized(
            x, factor, down, storage=storage, tokens_multiple=multiple, unsigned=unsigned, shift=shift
        )
    rows = -(-m // multiple) * multiple
    wanted, steps = quantize_groups(x.float() + shift, factor, unsigned)
    padded = torch.cat([wanted, wanted.new_zeros(rows - m, k)])
    assert torch.equal(codes.flatten().view(torch.uint8), stored(padded, storage))
    assert torch.equal(scale[:, :m], steps.t())
    assert not scale[:, m:].any()
    assert low.shape == (1 if multiple == 16 else 2, rows, rank)
    assert relative_error(low.sum(0)[:m], x.double() @ down.double()) < 1e-5
    assert not low[:, m:].any()


@pytest.mark.parametrize("seed", ["2", "3"])
def test_order(seed, simulated, monkeypatch):
    """The results are the same bits in whatever order threads run and copies land: every wait and barrier is there."""
    x, factor, down = operands(20, 512, 32)

    def run():
        with assume(SMALL):
            return cuda.quantized(
                x, factor, down, storage="swizzled8", tokens_multiple=16, unsigned=False, shift=0.0, most_splits=1
            )

    first = run()
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


@pytest.mark.parametrize("unsigned", [False, True])
def test_not_finite(unsigned, simulated):
    """A NaN or an infinity makes its group's scale not finite and its codes 0, and leaves all other groups alone."""
    x, factor, down = operands(5, 128, 16)
    clean, _ = quantize_groups(x, factor, unsigned)
    for row, bad in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[row, 70] = bad
    with assume(GPU):
        codes, scale, low = cuda.quantize_svdquant_w4a4(x, factor, down, 1, unsigned, None)
    finite = torch.ones(2, 5, dtype=torch.bool)
    finite[1, :3] = False
    assert torch.equal(scale.isfinite(), finite)
    clean[:3, 64:] = 0
    assert torch.equal(unpack_codes(codes, unsigned), clean)
    assert torch.equal(low.isfinite().all(1), torch.tensor([False, False, False, True, True]))


@pytest.mark.parametrize("units", [-1, 0, 1])
def test_quotients_of_codes(units):
    """No quotient by a step of 24 bits is rounded to another code than the one that is divided by IEEE's rules.

    A code can differ only next to the middle between k + 0.5 and a float beside it. With whole numbers for mantissas,
    value * 2**a - step * middle is then a multiple of 2**20 plus or minus the step: small, as a share of 2**49, only
    for steps near multiples of 2**20. All of those within 64 are tried, with reciprocals a unit off either way; but
    with one that is off, a step of 24 ones is beyond what the corrections reach.
    """
    around = torch.arange(-64, 65)
    steps = ((torch.arange(8, 17) << 20)[:, None] + around).flatten()
    steps = steps[(steps >= 1 << 23) & (steps < (1 << 24) - abs(units))].float()
    halves = torch.arange(15) + 0.5
    beside = torch.stack([torch.nextafter(halves, halves * sign) for sign in (0.0, 2.0)]).double()
    middles = ((beside + halves) / 2).flatten()
    near = (steps.double()[:, None] * middles).float()[..., None]
    values = torch.cat([near, *(torch.nextafter(near, near * sign) for sign in (0.0, 2.0))], -1)
    divisors = steps[:, None, None].expand_as(values).contiguous()
    out = torch.empty_like(values)
    cuda_simulator.launch(
        QUOTIENTS, "lowbit::quotients", torch.device("cpu"), 1, 32, [values, divisors, out, out.numel(), units]
    )
    assert torch.equal(out, values / divisors)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_quotients_of_values(dtype):
    """By a divisor of 16 bits, and by 7 and 15, a quotient has IEEE's bits."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1 << 18, generator=generator) * 30
    divisors = (torch.rand(1 << 18, generator=generator) + 0.01).to(dtype).float()
    divisors[:1000], divisors[1000:2000] = 7, 15
    for units in (-1, 0, 1):
        out = torch.empty_like(values)
        arguments = [values, divisors, out, out.numel(), units]
        cuda_simulator.launch(QUOTIENTS, "lowbit::quotients", torch.device("cpu"), 1, 32, arguments)
        assert torch.equal(out, values / divisors)


def test_where_operands_begin(monkeypatch):
    """16 bytes are loaded at a time: what begins elsewhere, or has gaps, is copied first, and nothing else is."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **_: seen.append(args[-1]))
    room, smooth = torch.zeros(1100, dtype=F16), torch.ones(64, dtype=F16)
    with assume(GPU):
        for offset in (0, 1, 8):
            x, down = room[offset : offset + 128].view(2, 64), room[offset : offset + 1024].view(64, 16)
            cuda.quantize_svdquant_w4a4(x, smooth, down, 1, False, x)
            for given, tensor in zip((x, x, down), (seen[-1][0], seen[-1][1], seen[-1][3]), strict=True):
                assert tensor.data_ptr() % 16 == 0
                assert (tensor.data_ptr() == given.data_ptr()) == (offset % 8 == 0)


def test_nothing_to_do(monkeypatch):
    """No tokens give empty results without a launch."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    with assume(GPU):
        found = cuda.quantize_svdquant_w4a4(
            torch.zeros(0, 128).half(), torch.ones(128).half(), torch.zeros(128, 8).half(), 16, False, None
        )
    assert [tuple(t.shape) for t in found] == [(0, 64), (2, 0), (0, 8)]


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    x, smooth, down = operands(2, 128, 8)
    with assume(GPU):
        assert cuda.refuses_quantize(x, smooth, down, 1, False, x) is None
        assert "x is float32" in cuda.refuses_quantize(x.float(), smooth, down, 1, False, None)
        assert "lora_x is float32" in cuda.refuses_quantize(x, smooth, down, 1, False, x.float())
        assert "lora_down is float16, x bfloat16" in cuda.refuses_quantize(x, smooth, down.half(), 1, False, None)
        assert "smooth is float64" in cuda.refuses_quantize(x, smooth.double(), down, 1, False, None)
        large = torch.empty(1, dtype=BF16).expand(1 << 29, 128)
        assert "fewer tokens" in cuda.refuses_quantize(large, smooth, down, 1, False, None)
        assert "meta" in cuda.refuses_quantize(x, smooth.to("meta"), down, 1, False, None)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in cuda.refuses_quantize(x, smooth, down, 1, False, None)
    with assume(Target("hip")):
        assert "NVIDIA" in cuda.refuses_quantize(x, smooth, down, 1, False, None)


@pytest.mark.parametrize(("architecture", "storage"), [
    ("sm_80", "fragments4"), ("sm_90a", "swizzled8"), ("sm_120a", "fragments8"),
])  # fmt: skip
def test_compiles(architecture, storage):
    """Blocks of few and of many tokens compile without a warning and keep all values in registers."""
    x, smooth, down = (torch.empty(*shape, dtype=BF16, device="meta") for shape in ((4096, 3072), (3072,), (3072, 32)))
    with assume(GPU), kernels.record() as launches:
        for m in (16, 4096):
            cuda.quantized(x[:m], smooth, down, storage=storage, tokens_multiple=16, unsigned=False, shift=0.0)
    assert len({launch.name for launch in launches}) == 2
    for launch in launches:
        made = compiler.compile_now(launch.source, launch.name, architecture)
        assert not made.warnings, made.warnings
        assert not made.spills
        assert launch.shared < 99 << 10
