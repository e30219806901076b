"""A pytest plugin that puts lowbit's operations in the place of ComfyUI's, for ComfyUI's own tests of them.

COMFYUI_PATH names the tree.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch

from lowbit.integrations.comfyui import lowbit_ops

sys.path.insert(0, os.environ["COMFYUI_PATH"])

importlib.import_module("comfy.cli_args").args.cpu = True  # before anything asks which device there is
ops = importlib.import_module("comfy.ops")

theirs = ops.mixed_precision_ops
made = []


def mixed_precision_ops(quant_config=None, compute_dtype=torch.bfloat16, full_precision_mm=False, disabled=()):
    """ComfyUI's signature, lowbit's operations; these are made from ComfyUI's own."""
    ops.mixed_precision_ops = theirs
    try:
        made.append(lowbit_ops(compute_dtype, full_precision_mm=full_precision_mm, disabled=disabled))
    finally:
        ops.mixed_precision_ops = mixed_precision_ops
    return made[-1]


ops.mixed_precision_ops = mixed_precision_ops


def pytest_terminal_summary(terminalreporter):
    """Say how often the operations were asked for: a suite that never does would prove nothing."""
    terminalreporter.write_line(f"lowbit operations made: {len(made)}")
