"""Quantizers and dequantizers on a GPU: the bytes they read and write a second against those of copying."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_linears import WrongResultError, any_blocks, relative_error
from benchmarks.gpu_linears import known
from benchmarks.gpu_timing import copies_for
from lowbit import dispatch, ops
from lowbit.dispatch import Kernel
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes

SHAPE = (4096, 12288)
RANK = 32
# Activations, by the ops that a forward runs; then weights, by format.
OPS: Mapping[str, Callable[[Tensor], Any]] = {
    "quantize_int8_rowwise": ops.quantize_int8_rowwise,
    "quantize_svdquant_w4a4": lambda x: ops.quantize_svdquant_w4a4(x, *_low_rank(x)),
    "quantize_nvfp4": lambda x: ops.quantize_nvfp4(x, _scale(x)),
    "quantize_mxfp8": ops.quantize_mxfp8,
    "quantize_per_tensor_fp8": lambda x: ops.quantize_per_tensor_fp8(x, _scale(x)),
    "quantize_int8_tensorwise": ops.quantize_int8_tensorwise,
}
SPECS = (
    "awq_w4a16", "nvfp4", "mxfp4", "fp8_e4m3(granularity=row)", "fp8_e4m3", "int8", "mxfp8", "int8(rotation=256)",
    "wna16(group_size=64)",
)  # fmt: skip
# Those of which nothing but the decoder has a kernel.
DECODED = (
    "gguf(type=Q8_0)", "gguf(type=Q4_K)", "gguf(type=Q6_K)", "gguf(type=Q4_0)", "gguf(type=Q5_K)", "gguf(type=Q2_K)",
    "w4a8_codebook",
)  # fmt: skip
ALIKE = 0.999  # of the bytes of codes: a division that rounds otherwise moves a tie
NEAR = 4e-3  # of floats: bfloat16's rounding


@dataclass
class Codec:
    """One thing to time on any of its `inputs`, with the bytes that it reads and writes."""

    name: str
    run: Callable[[Any], Any]
    inputs: list[Any]
    nbytes: int
    kernel: Kernel


def _scale(x: Tensor) -> Tensor:
    return _CONSTANTS.setdefault((x.device, "scale"), torch.tensor(0.01, device=x.device))


def _low_rank(x: Tensor) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    key = (x.device, k)
    if key not in _CONSTANTS:
        generator = torch.Generator(x.device).manual_seed(0)
        down = torch.randn(k, RANK, generator=generator, device=x.device).mul_(k**-0.5).to(x.dtype)
        _CONSTANTS[key] = (torch.ones(k, dtype=x.dtype, device=x.device), down)
    return _CONSTANTS[key]


_CONSTANTS: dict[Any, Any] = {}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, Mapping) else result)


def compare(name: str, found: Any, wanted: Any) -> None:
    """Raise `WrongResultError` unless codes are nearly all alike and floats near."""
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise WrongResultError(
                f"{name}: {one.dtype} {list(one.shape)} instead of {other.dtype} {list(other.shape)}"
            )
        if one.dtype.itemsize == 1:
            share = (raw_bytes(one) == raw_bytes(other)).float().mean().item()
            if share < ALIKE:
                raise WrongResultError(f"{name}: {share:.2%} of the codes are eager's; no speed is reported")
        elif (error := relative_error(one, other.double())) > NEAR:
            raise WrongResultError(f"{name}: its result is off by {error:.1e}; no speed is reported")


def codecs(device: torch.device, l2: int, shape: tuple[int, int] = SHAPE) -> Iterator[tuple[str, Callable[[], Codec]]]:
    """(name, how to make it), the most important first."""
    for name in OPS:
        yield name, lambda name=name: _quantizer(name, device, l2, shape)
    for spec in (*SPECS, *DECODED):
        if known(spec):
            yield f"dequantize {spec}", lambda spec=spec: _decoder(spec, device, l2, shape)
    for spec in SPECS:
        if known(spec):
            yield f"quantize {spec}", lambda spec=spec: _encoder(spec, device, l2, shape)


def _matrix(device: torch.device, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).bfloat16()


def _copies(value: Tensor, l2: int) -> list[Tensor]:
    return [value, *(value.clone() for _ in range(copies_for(value.nbytes, l2) - 1))]


def _right(run: Callable[[], Any]) -> Any:
    with dispatch.use_backend("eager"):
        return run()


def _quantizer(name: str, device: torch.device, l2: int, shape: tuple[int, int]) -> Codec:
    x, run = _matrix(device, shape), OPS[name]
    made = run(x)
    compare(name, made, _right(lambda: run(x)))
    nbytes = x.nbytes + sum(part.nbytes for part in tensors(made))
    kernel = dispatch.candidates(name, dispatch.ANY_FORMAT, device.type)[0]  # it does not refuse, or `run` would raise
    return Codec(name, run, _copies(x, l2), nbytes, kernel)


@contextlib.contextmanager
def unchecked(entry: Kernel) -> Iterator[None]:
    """Within this block a quantizer of Triton's does not look whether the weight is finite: to look is to wait for it.

    A call that waits cannot be recorded in a CUDA graph, and its time would be that of the host.
    """
    if entry.backend != "triton":
        yield
        return
    encoders = importlib.import_module("lowbit.backends.triton.encoders")
    finished = encoders.finished
    encoders.finished = lambda parts, *_: parts
    try:
        yield
    finally:
        encoders.finished = finished


def _encoder(spec: str, device: torch.device, l2: int, shape: tuple[int, int]) -> Codec:
    fmt, w = parse_spec(spec), _matrix(device, shape)
    entry = dispatch.select("quantize", fmt.name, "", device.type, (fmt, w, None, "weight"))

    def run(value: Tensor) -> Any:
        with unchecked(entry):
            return entry.run(fmt, value, None, "weight")

    made = entry.run(fmt, w, None, "weight")
    name = f"quantize {spec}"
    compare(name, made, fmt.quantize(w))
    return Codec(name, run, _copies(w, l2), w.nbytes + sum(p.nbytes for p in made.values()), entry)


def _decoder(spec: str, device: torch.device, l2: int, shape: tuple[int, int]) -> Codec:
    fmt = parse_spec(spec)
    if fmt.encodable:
        parts = fmt.quantize(_matrix(device, shape))
    else:
        drawn = any_blocks(fmt, *shape, torch.Generator().manual_seed(0))
        parts = {name: part.to(device) for name, part in drawn.items()}
    entry = dispatch.select("dequantize", fmt.name, "", device.type, (fmt, parts, shape, torch.bfloat16))

    def run(own: Any) -> Tensor:
        return entry.run(fmt, own, shape, torch.bfloat16)

    made = run(parts)
    name = f"dequantize {spec}"
    compare(name, made, fmt.dequantize(parts, shape, torch.bfloat16))
    stored = sum(part.nbytes for part in parts.values())
    copies = copies_for(stored, l2) - 1
    inputs = [parts, *({name: part.clone() for name, part in parts.items()} for _ in range(copies))]
    return Codec(name, run, inputs, stored + made.nbytes, entry)
