"""Measured choices of a small model, and statistics to measure it with."""

from __future__ import annotations

import dataclasses

import torch

from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.mixed_precision import find_choices
from lowbit.checkpoint.sensitivity import measure
from lowbit.solvers import Statistics

SPECS = ("nvfp4", "awq_w4a16", "int8(activations=none)")


def measured(source, specs=SPECS, statistics=None, **options):
    """The choices of a source with their errors."""
    found = find_choices(source, specs, preset="none", statistics=statistics, **options)
    errors = measure(source, found.candidates, statistics, measure_with="rtn", rows=0)
    return found.with_errors(errors, "rtn")


def statistics_of(k: int, seed: int = 0) -> Statistics:
    """Inputs of two very different strengths, in two halves."""
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randn((512, k), generator=generator) * torch.logspace(-1, 1, k) for _ in range(2)]
    first, second = (x.t() @ x / len(x) for x in halves)
    return Statistics(hessian=first, tokens=512, held_out=second, held_out_tokens=512)


def errors_of(selection, layer: str) -> dict[str, float]:
    """The errors of a layer by format."""
    found = next(each for each in selection.layers if each.name == layer)
    return {choice.name: choice.error for choice in found.choices}


def with_gradients(source, scales):
    """Statistics of every layer of two dimensions; those whose name starts so have gradients of that strength."""
    known = {}
    for name, info in source.components[0].tensors.items():
        if len(info.shape) == 2:
            n, k = info.shape
            layer = name.removesuffix(".weight")
            strength = next((scale for start, scale in scales.items() if layer.startswith(start)), 1.0)
            moments = dict.fromkeys(("output_hessian", "output_held_out"), torch.eye(n) * strength)
            known[layer] = dataclasses.replace(statistics_of(k), **moments)
    return InMemory(known)
