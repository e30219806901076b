"""Compile recorded launches for a GPU that need not be there: what CI checks, and what a kernel costs in registers.

>>> from lowbit.backends.triton.device import Target  # doctest: +SKIP
>>> with assume(Target("cuda", (9, 0))), record() as launches:  # doctest: +SKIP
...     linear_awq_w4a16(fmt, x, parts, None)  # on the meta device
>>> compile_launch(launches[0], launches[0].configs[0], Target("cuda", (9, 0))).registers  # doctest: +SKIP
79
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.backends.triton.device import Target
from lowbit.backends.triton.tuning import Config, Launch

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5", torch.bool: "i1",
}  # fmt: skip
_DIVISIBLE = [["tt.divisibility", 16]]
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What became of a launch: `registers` a thread, `spills` in bytes a thread, `shared` memory in bytes a program.

    `source` is Triton's own form of it (TTIR), in which arguments have their names.
    """

    registers: int
    spills: int
    shared: int
    assembly: str
    source: str = ""


def compile_launch(launch: Launch, config: Config, target: Target) -> Compiled:
    """Compile one config of a recorded launch. Raises what Triton raises where it cannot."""
    function, signature, constants, attributes = launch.kernel.function, {}, {}, {}
    values = {**launch.arguments, **config.constants}
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        kind = _kind(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = getattr(value, "value", value)
        elif isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = _DIVISIBLE
    source = ASTSource(function, signature, constants, attributes)
    gpu = GPUTarget("cuda", target.capability[0] * 10 + target.capability[1], 32)
    if target.kind == "hip":
        gpu = GPUTarget("hip", "gfx942", 64)
    made = triton.compile(source, target=gpu, options=config.options)
    if target.kind != "cuda":
        return Compiled(0, 0, made.metadata.shared, made.asm["amdgcn"], made.asm["ttir"])
    registers, spills = _resources(made.asm["cubin"], made.metadata.name)
    return Compiled(registers, spills, made.metadata.shared, made.asm["ptx"], made.asm["ttir"])


def _kind(value: Any, parameter: Any) -> str:
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _resources(cubin: bytes, kernel: str) -> tuple[int, int]:
    """Registers a thread of a kernel and bytes of its stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return _read_resources(said, kernel)


def _read_resources(said: str, kernel: str) -> tuple[int, int]:
    """What cuobjdump says of a kernel: functions that are not inlined have entries of their own."""
    found = re.search(rf"Function {re.escape(kernel)}:\s*REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of the registers of {kernel}: {said[:200]}")
    return int(found[1]), int(found[2])
