"""Weights to GGUF blocks: lowbit's encoders beside ggml's `ggml_quantize_chunk`, in error and in time.

    LOWBIT_GGML=FOLDER python -m benchmarks.gguf_encoders [--seconds 0.5] [--output FILE]

FOLDER has ggml's libraries (`benchmarks.cpu_ggml` says how to build them). Both get the same float32 weights and take
turns in one process, on one thread, which is what ggml's function uses. The errors are those of ggml's own decoding, by
the gguf package, of either's blocks. Three weights: Gaussian, heavy-tailed (Student's t, 4 degrees of freedom), and a
layer of all-MiniLM-L6-v2. Without anything known of the columns, as `--solver auto` makes blocks and, of the types that
ggml's reference is made of, as `rtn` does; and with an importance for each column: of the squared error in lowbit's
`scale_search` and in ggml's importance matrix alike, over three decades, and the signal-to-noise ratio weighted by it.
Types for which ggml requires an importance matrix are not among those that lowbit makes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import gguf
import torch
from torch import Tensor

from benchmarks import cpu_ggml
from benchmarks.minilm_model import load_model, machine
from lowbit.formats import parse_spec
from lowbit.numerics.gguf_blocks import GGML_TYPES
from lowbit.numerics.gguf_encode import AS_GGML, WRITABLE
from lowbit.ops.encode import encode, encode_searched

RESULT = Path(__file__).parent / "results" / "gguf_encoders.json"
SIZE = 1024
LAYER = "encoder.layer.3.intermediate.dense"  # [1536, 384]: its columns are halved into rows that 256 divides
NUMBERS = {name: number for number, (name, *_) in GGML_TYPES.items()}


def weights() -> dict[str, Tensor]:
    """The weights by name, float32, with columns that 256 divides."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, SIZE, generator=generator)
    squares = torch.randn(4, SIZE, SIZE, generator=generator).square().mean(0)
    model, _ = load_model()
    layer = model.get_submodule(LAYER).weight.detach().float()
    return {"Gaussian": normal, "heavy-tailed": normal / squares.sqrt(), "MiniLM": layer.reshape(-1, 256).contiguous()}


def importance(columns: int) -> Tensor:
    """How much the squared error of each column counts: over three decades."""
    return 10 ** (3 * torch.rand(columns, generator=torch.Generator().manual_seed(1)) - 1.5)


class Ggml:
    """`ggml_quantize_chunk` of one type."""

    def __init__(self, kind: str) -> None:
        base = ctypes.CDLL(str(Path(cpu_ggml.os.environ[cpu_ggml.FOLDER]) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._run: Callable[..., int] = base.ggml_quantize_chunk
        self._run.restype = c_size_t  # type: ignore[attr-defined]
        self._run.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)  # type: ignore[attr-defined]
        self._number, self._fmt = NUMBERS[kind], parse_spec(f"gguf(type={kind})")

    def __call__(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """w [N, K] float32 -> blocks, uint8 [N, K / columns * bytes]."""
        (n, k), kind = w.shape, GGML_TYPES[self._number]
        out = torch.empty((n, k // kind[1] * kind[2]), dtype=torch.uint8)
        given = None if importance is None else importance.data_ptr()
        if self._run(self._number, w.data_ptr(), out.data_ptr(), 0, n, k, given) != out.numel():
            sys.exit(f"ggml did not write all of {self._fmt.spec}")
        return out


def ours(kind: str, *, rounded: bool = False) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The same of lowbit: searched or, without an importance, rounded to nearest."""
    fmt = parse_spec(f"gguf(type={kind})")

    def run(w: Tensor, importance: Tensor | None) -> Tensor:
        return (encode(w, fmt) if rounded else encode_searched(w, fmt, importance))["qdata"]

    return run


def decibels(kind: str, blocks: Tensor, w: Tensor, importance: Tensor | None) -> float:
    """Signal over noise, weighted by the importance, as ggml decodes the blocks."""
    decoded = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(NUMBERS[kind]))
    error = torch.from_numpy(decoded).double() - w.double()
    count = torch.ones(w.shape[1]) if importance is None else importance
    lost, signal = (float((x.square() @ count.double()).sum()) for x in (error, w.double()))
    return 10 * float(torch.tensor(signal / lost).log10())


def measure(kind: str, name: str, w: Tensor, importance: Tensor | None, seconds: float) -> dict[str, object]:
    """One row of the result."""
    ways = {"lowbit": ours(kind), "ggml": Ggml(kind)}
    if importance is None and kind in AS_GGML:
        ways["lowbit, rtn"] = ours(kind, rounded=True)
    errors = {way: decibels(kind, run(w, importance), w, importance) for way, run in ways.items()}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    turn, end = 0, time.perf_counter() + seconds
    while turn < 3 or time.perf_counter() < end:
        for way in list(ways)[:: 1 - 2 * (turn % 2)]:
            began = time.perf_counter()
            ways[way](w, importance)
            spent[way].append(time.perf_counter() - began)
        turn += 1
    ratios = [old / new for new, old in zip(spent["lowbit"], spent["ggml"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    speed = {way: w.numel() / statistics.median(values) / 1e6 for way, values in spent.items()}
    return {
        "type": kind, "weights": name, "importance": importance is not None, "sqnr_db": errors,
        "million_weights_a_second": speed, "ratio": middle, "quartiles": [low, high],
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=0.5, help="for each row")
    arguments.add_argument("--output", type=Path, default=RESULT)
    given = arguments.parse_args()
    if why := cpu_ggml.why_not():
        sys.exit(f"ggml: {why}")
    torch.set_num_threads(1)
    rows = []
    for name, w in weights().items():
        for kind in WRITABLE:
            for counts in (None, importance(w.shape[1])):
                rows.append(measure(kind, name, w, counts, given.seconds))
                errors, speed = rows[-1]["sqnr_db"], rows[-1]["million_weights_a_second"]
                print(
                    f"{name:13s}{kind:6s}{'importance' if counts is not None else 'plain':11s}"
                    f"ggml {errors['ggml']:6.2f} dB {speed['ggml']:6.1f} M/s   "  # type: ignore[index]
                    f"lowbit {errors['lowbit']:6.2f} dB {speed['lowbit']:6.1f} M/s   {rows[-1]['ratio']:5.1f} x"  # type: ignore[index]
                    + (f"   rtn {speed['lowbit, rtn']:6.1f} M/s" if "lowbit, rtn" in speed else ""),  # type: ignore[operator,index]
                    flush=True,
                )
    given.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
