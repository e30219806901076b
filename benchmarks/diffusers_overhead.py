"""What diffusers and lowbit's tensors cost around the kernels: a step of FLUX's transformer, on one core.

The same model is run twice in turn: as diffusers loads it, and with every quantized linear calling its kernel directly,
as if nothing stood between them. Two ratios, each the median over pairs of runs that follow each other:

    step      the whole forward pass, attention and norms included
    linears   only the quantized linears, one after the other, on the inputs that they have in the pass

Before anything is timed, both ways must give the same answer, bit for bit.

    python benchmarks/diffusers_overhead.py [--format SPEC ...] [--width 1024] [--tokens 256] [--pairs 9] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, __version__ as diffusers_version
from torch import Tensor, nn

import lowbit
from lowbit import dispatch
from lowbit.integrations.diffusers import LowbitConfig
from lowbit.layer_kinds import quantized_layers

FORMATS = ["fp8_e4m3(granularity=row)", "int8", "nvfp4", "awq_w4a16", "svdquant_w4a4(rank=32)"]
HEAD = 64
TEXT = 64


def main() -> None:
    """Measure all formats and print them."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--format", nargs="+", default=FORMATS, help="specs of the weights")
    arguments.add_argument("--width", type=int, default=1024, help="channels of the model (FLUX.1: 3072)")
    arguments.add_argument("--tokens", type=int, default=256, help="tokens of the image (1024 x 1024 pixels: 4096)")
    arguments.add_argument("--pairs", type=int, default=9, help="pairs of runs")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model_of(options.width).save_pretrained(folder)
        for spec in options.format:
            rows.append(measure(Path(folder), spec, options.tokens, options.pairs))
            if not options.json:
                show(rows[-1], head=len(rows) == 1)
    if options.json:
        sizes = {"width": options.width, "tokens": options.tokens, "text": TEXT, "pairs": options.pairs}
        print(json.dumps({"sizes": sizes, "environment": environment(), "rows": rows}, indent=2))


def model_of(width: int) -> FluxTransformer2DModel:
    """FLUX with one double and one single block."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=width,
        pooled_projection_dim=256,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


@torch.inference_mode()
def measure(folder: Path, spec: str, tokens: int, pairs: int) -> dict[str, Any]:
    """The two ratios for one format, with their quartiles, and the milliseconds of a step."""
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=LowbitConfig(spec), dtype=torch.bfloat16)
    inputs = inputs_of(model, tokens)
    step = partial(model, **inputs)
    calls = recorded(model, step)
    kernels = {layer: bare(layer, x) for layer, x in calls}
    expected = step().sample
    with replaced(kernels):
        if not torch.equal(step().sample, expected):
            raise SystemExit(f"{spec}: the kernels alone give another answer; nothing is timed")

    def bare_step() -> None:
        with replaced(kernels):
            step()

    def linears() -> None:
        for layer, x in calls:
            layer(x)

    def bare_linears() -> None:
        for layer, x in calls:
            kernels[layer](x)

    whole, only = compare(step, bare_step, pairs), compare(linears, bare_linears, pairs)
    names = sorted({kernel.args[0].name for kernel in kernels.values()})
    return {"format": spec, "layers": len(kernels), "kernels": names, "step": whole, "linears": only}


def inputs_of(model: Any, tokens: int) -> dict[str, Tensor]:
    """Random latents and a random text in bfloat16."""
    side = int(tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    random = partial(torch.randn, dtype=torch.bfloat16)
    return {
        "hidden_states": random(1, side * side, model.config.in_channels),
        "encoder_hidden_states": random(1, TEXT, model.config.joint_attention_dim),
        "pooled_projections": random(1, 256),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def recorded(model: nn.Module, step: Callable[[], object]) -> list[tuple[nn.Module, Tensor]]:
    """The quantized linears in the order of their calls, with their inputs."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0])))
        for _, layer in quantized_layers(model)
    ]
    step()
    for hook in hooks:
        hook.remove()
    return calls


def bare(layer: Any, x: Tensor) -> partial[Tensor]:
    """The kernel that serves a linear, ready to be called on x."""
    weight = layer.weight
    arguments = (weight.format, x, weight.parts, layer.bias)
    chosen = dispatch.select("linear", weight.format.name, weight.kernel_layout, x.device.type, arguments)
    return partial(_run, chosen, weight.format, weight.parts, layer.bias)


def _run(kernel: dispatch.Kernel, fmt: Any, parts: Any, bias: Any, x: Tensor) -> Tensor:
    return kernel.run(fmt, x, parts, bias)


@contextmanager
def replaced(kernels: dict[nn.Module, partial[Tensor]]) -> Any:
    """Within this block the linears call their kernels."""
    for layer, kernel in kernels.items():
        layer.forward = kernel
    try:
        yield
    finally:
        for layer in kernels:
            del layer.forward


def compare(ours: Callable[[], object], bare: Callable[[], object], pairs: int) -> dict[str, Any]:
    """How much longer one takes than the other, run in turn; the order changes with every pair.

    Seconds of the process, which other processes on the machine disturb less than those of the clock.
    """
    ours()
    bare()
    times: dict[int, list[float]] = {0: [], 1: []}
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.process_time()
            (ours, bare)[which]()
            times[which].append(time.process_time() - start)
    ratios = [one / other for one, other in zip(times[0], times[1], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "ratio_of_least": round(min(times[0]) / min(times[1]), 4),
        "ms": round(min(times[0]) * 1e3, 2),
    }


def show(row: dict[str, Any], *, head: bool) -> None:
    """Print one format."""
    if head:
        titles = "".join(f"{what + ' ms':>12}{'ratio':>9}{'quartiles':>18}" for what in ("step", "linears"))
        print(f"{'format':<28}{titles}")
    cells = []
    for what in ("step", "linears"):
        one = row[what]
        spread = f"{one['quartiles'][0]:.3f} - {one['quartiles'][1]:.3f}"
        cells.append(f"{one['ms']:>12.1f}{one['ratio']:>9.4f}{spread:>18}")
    print(f"{row['format']:<28}{''.join(cells)}")


def environment() -> dict[str, Any]:
    """Where this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "lowbit": lowbit.__version__,
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
