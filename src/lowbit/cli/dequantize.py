"""`lowbit dequantize`: a quantized checkpoint as plain weights again."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from lowbit.checkpoint.dequantize import DTYPES, dequantize as run
from lowbit.cli import options
from lowbit.cli.output import asking, command, epilog, parse_dtype, print_json, progress, say, size
from lowbit.cli.whole import open_whole

EPILOG = epilog(
    "lowbit dequantize flux-fp8.safetensors -o flux-bf16.safetensors",
    "lowbit dequantize flux-nvfp4.safetensors -o flux-fp16.safetensors --dtype float16",
)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@command
def dequantize(
    src: options.SourcePath,
    output: options.OutputText,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Dtype of the decoded weights: {', '.join(_DTYPES)}; by default what each was, "
            "bfloat16 for 8-bit floats that no scale belongs to.",
            show_default=False,
        ),
    ] = "",
    jobs: options.Jobs = None,
    resume: options.Resume = True,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the weights that a quantized checkpoint stands for, as a file that any program loads.

    Weights that were only cast to 8-bit floats become 16 bits, with the same values.
    """
    chosen = _dtype(dtype)
    with open_whole(src, source_dialect) as source, progress("decoding") as update:
        done = run(source, output, dtype=chosen, jobs=jobs, resume=resume, progress=update)
    if as_json:
        print_json(done.to_json())
        return
    widened = f", {done.widened} tensors of 8-bit floats without a scale widened" if done.widened else ""
    say(f"{len(done.layers)} layers decoded{widened}, {done.copied} tensors copied")
    say(f"{done.target}: {size(done.bytes_after)} in {done.seconds:.1f} s", "bold")


def _dtype(name: str) -> torch.dtype | None:
    with asking():
        return parse_dtype(name, _DTYPES) if name else None
