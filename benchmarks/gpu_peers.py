"""What our linears on a GPU are compared with: PyTorch's own products, and those of other people that are installed.

Each is made by a function that may raise: a peer that is not installed, or does not run on this GPU, is named with the
reason. Peers that quantize the weight themselves are checked against the dense weight they were given, within what
their number of bits may cost; the others get our codes, and are checked against our product.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cpu_linears import Drawn, Entry, check_error, group_of
from benchmarks.gpu_linears import FP8_ROW, SPECS
from benchmarks.gpu_timing import copies_for
from lowbit.layouts.scale_128x4 import swizzle
from lowbit.numerics.packing import swap_nibbles, unpack_nibbles

CUBLAS = "cuBLAS bf16"
NEAR, EIGHT_BITS, FOUR_BITS = 0.05, 0.06, 0.2  # relative errors: to notice something else, not to judge its rounding
WEIGHT_ONLY_4 = ("awq_w4a16", "nvfp4", "mxfp4")
INT8 = ("int8",)
FP8 = (FP8_ROW, "fp8_e4m3(granularity=row)")
_GROUP = 64
_LEAST_INT_MM = 17  # rows that `torch._int_mm` asks for


@dataclass(frozen=True)
class Peer:
    """How to make an entry: `make(n, k, drawn, l2)`, from the package that it needs; `of` are the formats it is for."""

    name: str
    of: tuple[str, ...]
    package: str
    make: Callable[[Peer, Dense, Drawn | None, int], Entry]
    uses: str = ""
    """The format whose drawn weight it multiplies; none for the dense one."""


@dataclass(frozen=True)
class Dense:
    """A bfloat16 weight [n, k] on the GPU."""

    weight: Tensor

    @classmethod
    def make(cls, n: int, k: int, device: torch.device) -> Dense:
        """Random values of the size that a layer's have."""
        generator = torch.Generator(device).manual_seed(1)
        w = torch.randn(n, k, generator=generator, device=device, dtype=torch.float32)
        return cls(w.mul_(k**-0.5).bfloat16())

    def check(self, name: str, limit: float, x: Tensor, y: Tensor) -> float:
        """The relative error of a product with it."""
        return check_error(name, y, x.double() @ self.weight.double().t(), limit)

    def layer(self) -> nn.Linear:
        """A linear of its own copy of the weight."""
        n, k = self.weight.shape
        made = nn.Linear(k, n, bias=False, device="meta")
        made.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        return made


def cublas(dense: Dense, l2: int) -> Entry:
    """PyTorch's product in bfloat16: what every ratio in the table is to."""
    return _of_tensors(CUBLAS, (dense.weight,), l2, F.linear, partial(dense.check, CUBLAS, NEAR))


def _of_tensors(
    name: str, parts: tuple[Tensor, ...], l2: int, run: Callable[..., Tensor], check: Callable[[Tensor, Tensor], float],
    **more: Any,
) -> Entry:  # fmt: skip
    nbytes = sum(part.nbytes for part in parts)
    copies = [parts, *(tuple(p.clone() for p in parts) for _ in range(copies_for(nbytes, l2) - 1))]
    return Entry(name, lambda x, own: run(x, *own), copies, nbytes, check, **more)


def _of_layer(peer: Peer, dense: Dense, layer: nn.Module, bits: int, l2: int) -> Entry:
    """A module that multiplies, with a weight of so many bits."""
    nbytes = dense.weight.numel() * bits // 8
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies_for(nbytes, l2) - 1))]
    limit = FOUR_BITS if bits < 8 else EIGHT_BITS
    return Entry(peer.name, lambda x, own: own(x), layers, nbytes, partial(dense.check, peer.name, limit), of=peer.of)


def _near(peer: Peer, right: Callable[[Tensor], Tensor], limit: float = NEAR) -> Callable[[Tensor, Tensor], float]:
    return lambda x, y: check_error(peer.name, y, right(x), limit)


def _drawn(drawn: Drawn | None) -> Drawn:
    assert drawn is not None, "the peer names a format in `uses`"
    return drawn


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def _tinygemm(peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    """PyTorch's 4-bit product with the very weight of our awq_w4a16: its formula is the same."""
    one = _drawn(drawn)
    parts, group = one.weight.parts, group_of(one.fmt)
    packed = torch._convert_weight_to_int4pack(swap_nibbles(parts["qdata"].view(torch.uint8)), 8)  # noqa: SLF001
    scales = torch.stack((parts["scale"], parts["zero"]), dim=-1).contiguous()

    def run(x: Tensor, weight: Tensor, scale_and_zero: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, weight, group, scale_and_zero)  # noqa: SLF001

    return _of_tensors(peer.name, (packed, scales), l2, run, _near(peer, one.exact), of=peer.of)


def _int_mm(peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    """The integer product alone, of an input that is int8 already: no rounding of activations, no scales."""
    one = _drawn(drawn)
    codes = one.weight.parts["qdata"]

    def check(x: Tensor, y: Tensor) -> float:
        return check_error(peer.name, y, x.double() @ codes.double().t(), 1e-9)

    def given(x: Tensor) -> Tensor:
        if x.shape[0] < _LEAST_INT_MM:
            raise RuntimeError(f"takes {_LEAST_INT_MM} tokens or more")
        return (x.float() * (127 / x.abs().amax())).round().to(torch.int8)

    return _of_tensors(
        peer.name, (codes,), l2, lambda x, w: torch._int_mm(x, w.t()), check, of=peer.of, input=given
    )  # fmt: skip


def _scaled_mm(peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    """PyTorch's fp8 product by row, with its input rounded by PyTorch operations as a program would."""
    one = _drawn(drawn)
    codes, scale = one.weight.parts["qdata"], one.weight.parts["scale"].reshape(1, -1).float()

    def run(x: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
        own = x.abs().amax(1, keepdim=True).float() / 448
        rounded = (x / own).to(torch.float8_e4m3fn)
        return torch._scaled_mm(rounded, w.t(), own, by_row, out_dtype=torch.bfloat16)  # noqa: SLF001

    return _of_tensors(peer.name, (codes, scale), l2, run, _near(peer, one.exact), of=peer.of)


# ---- others ---------------------------------------------------------------------------------------------------------


def _torchao(config: str, bits: int, peer: Peer, dense: Dense, drawn: Drawn | None, l2: int, **options: Any) -> Entry:
    with _quiet():
        quantization = importlib.import_module("torchao.quantization")
        layer = dense.layer()
        quantization.quantize_(layer, getattr(quantization, config)(**options))
    return _of_layer(peer, dense, layer, bits, l2)


def _gemlite(helper: str, bits: int, peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    made = getattr(importlib.import_module("gemlite.helper"), helper)(device="cuda:0", dtype=torch.bfloat16)
    return _of_layer(peer, dense, made.from_linear(dense.layer(), del_orig=False), bits, l2)


def _gemlite_int4(peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    """gemlite's 4-bit product with our codes: (code - z) * scale, where ours is (code - 8) * scale + zero."""
    one = _drawn(drawn)
    parts, (n, k) = one.weight.parts, one.weight.matrix
    scale, zero = parts["scale"].t().float(), parts["zero"].t().float()
    codes = unpack_nibbles(parts["qdata"].view(torch.uint8)).view(n, k)
    middle = 8 - zero / scale.masked_fill(scale == 0, 1.0)
    helper = importlib.import_module("gemlite.helper").A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    layer = helper.from_weights(codes, scale.reshape(-1, 1).bfloat16(), middle.reshape(-1, 1).bfloat16())
    found = _of_layer(peer, dense, layer, 4, l2)
    found.check = _near(peer, one.exact)
    return found


def _bitsandbytes(peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    functional = importlib.import_module("bitsandbytes.functional")
    matmul = importlib.import_module("bitsandbytes").matmul_4bit
    codes, state = functional.quantize_4bit(dense.weight, blocksize=_GROUP, quant_type="nf4")
    check = partial(dense.check, peer.name, FOUR_BITS)
    return _of_tensors(peer.name, (codes,), l2, lambda x, w: matmul(x, w.t(), state), check, of=peer.of)


def _kitchen(backend: str, spec: str, peer: Peer, dense: Dense, drawn: Drawn | None, l2: int) -> Entry:
    """comfy-kitchen's function for a format, by one of its backends alone, with our codes in its order."""
    kitchen, one = importlib.import_module("comfy_kitchen"), _drawn(drawn)
    own, run = _KITCHEN[spec](kitchen, one)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        with kitchen.use_backend(backend):
            return run(x, *weights)

    right = one.rounded if one.fmt.rounds_input else one.exact
    limit = FOUR_BITS if spec == "nvfp4" else NEAR  # it rounds its input to 4 bits, too
    return _of_tensors(peer.name, own, l2, call, _near(peer, right, limit), of=peer.of)


Kitchen = Callable[[Any, Drawn], tuple[tuple[Tensor, ...], Callable[..., Tensor]]]


def _kitchen_awq(kitchen: Any, one: Drawn) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    parts, group = one.weight.parts, group_of(one.fmt)
    own = (parts["qdata"], parts["scale"], parts["zero"])
    return own, lambda x, *w: kitchen.gemv_awq_w4a16(x, *w, None, group)


def _kitchen_int8(kitchen: Any, one: Drawn) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    return (one.weight.parts["qdata"], one.weight.parts["scale"]), kitchen.int8_linear


def _kitchen_svdquant(kitchen: Any, one: Drawn) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    def run(x: Tensor, q: Tensor, scale: Tensor, smooth: Tensor, down: Tensor, up: Tensor) -> Tensor:
        tokens = x.shape[0]
        codes, scales, low = kitchen.quantize_svdquant_w4a4(x, smooth, down)
        return kitchen.scaled_mm_svdquant_w4a4(codes, q, scales, scale, low, up)[:tokens]

    return tuple(one.weight.parts.values()), run


def _kitchen_nvfp4(kitchen: Any, one: Drawn) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    parts = one.weight.parts
    own = (swap_nibbles(parts["qdata"]), parts["global_scale"].float(), swizzle(parts["scale"]))

    def run(x: Tensor, q: Tensor, shared: Tensor, scales: Tensor) -> Tensor:
        tensor_scale = x.abs().amax().float() / 2688
        codes, own_scales = kitchen.quantize_nvfp4(x, tensor_scale, pad_16x=True)
        found = kitchen.scaled_mm_nvfp4(codes, q, tensor_scale, shared, own_scales, scales, out_dtype=torch.bfloat16)
        return found[: x.shape[0]]

    return own, run


_KITCHEN: dict[str, Kitchen] = {
    "awq_w4a16": _kitchen_awq, "int8": _kitchen_int8, "svdquant_w4a4": _kitchen_svdquant, "nvfp4": _kitchen_nvfp4,
}  # fmt: skip


def _table() -> Iterator[Peer]:
    yield Peer("torch tinygemm int4", WEIGHT_ONLY_4, "torch", _tinygemm, "awq_w4a16")
    yield Peer("torch _int_mm, product alone", INT8, "torch", _int_mm, "int8")
    yield Peer("torch _scaled_mm by row", FP8, "torch", _scaled_mm, "fp8_e4m3(granularity=row)")
    yield Peer("torchao int8 dynamic", INT8, "torchao", partial(_torchao, "Int8DynamicActivationInt8WeightConfig", 8))
    tiled = {"group_size": _GROUP, "int4_packing_format": "tile_packed_to_4d"}
    yield Peer("torchao int4", WEIGHT_ONLY_4, "torchao", partial(_torchao, "Int4WeightOnlyConfig", 4, **tiled))
    yield Peer("gemlite int4", WEIGHT_ONLY_4, "gemlite", _gemlite_int4, "awq_w4a16")
    for name, helper, bits, of in (
        ("gemlite mxfp4", "A16W4_MXFP", 4, ("mxfp4",)),
        ("gemlite nvfp4", "A16W4_NVFP", 4, ("nvfp4",)),
        ("gemlite int8 dynamic", "A8W8_int8_dynamic", 8, INT8),
        ("gemlite fp8 dynamic", "A8W8_fp8_dynamic", 8, FP8[:1]),
        ("gemlite fp8", "A16W8_FP8", 8, FP8[1:]),
    ):
        yield Peer(name, of, "gemlite", partial(_gemlite, helper, bits))
    yield Peer("bitsandbytes nf4", WEIGHT_ONLY_4, "bitsandbytes", _bitsandbytes)
    for spec in _KITCHEN:
        for backend in ("cuda", "triton"):
            yield Peer(
                f"comfy-kitchen {backend}, {spec}", (spec,), "comfy_kitchen", partial(_kitchen, backend, spec), spec
            )


PEERS = tuple(_table())


def missing() -> dict[str, str]:
    """Packages that are not installed."""
    packages = dict.fromkeys(peer.package for peer in PEERS)
    return {name: "not installed" for name in packages if importlib.util.find_spec(name) is None}


def peers(
    specs: Sequence[str], dense: Dense, drawn: Callable[[str], Drawn], l2: int, failures: dict[str, str]
) -> list[Entry]:
    """The peers of these formats that are installed; why one could not be made is put into `failures`."""
    absent, found = missing(), []
    for peer in PEERS:
        if peer.package in absent or not set(peer.of) & set(specs):
            continue
        try:
            found.append(peer.make(peer, dense, drawn(peer.uses) if peer.uses else None, l2))
        except Exception as error:  # noqa: BLE001  (other people's code raises anything; the reason is reported)
            failures[peer.name] = reason(error)
    return found


def reason(error: BaseException) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what other packages say while they are imported."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


assert all(spec in SPECS for peer in PEERS for spec in peer.of), "a peer is for a format that is not measured"
