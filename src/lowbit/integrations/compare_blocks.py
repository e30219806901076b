"""Where along a model the errors of its quantized layers arise: the outputs of its blocks, watched while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.report.end_to_end import BlockError, BlockMeter

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def largest_list(model: nn.Module) -> str | None:
    """The name of the `nn.ModuleList` with the most weights among those of two modules and more: the blocks."""
    found = {
        name: sum(value.numel() for value in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    return max(found, key=lambda name: found[name], default=None)


class Pair:
    """A reference and a candidate of the same structure that are run on the same inputs."""

    def __init__(self, reference: nn.Module, candidate: nn.Module) -> None:
        self.reference, self.candidate = reference, candidate
        name = largest_list(reference)
        self._blocks: list[tuple[BlockMeter, nn.Module, nn.Module]] = []
        if name is not None:
            pairs = zip(reference.get_submodule(name).children(), candidate.get_submodule(name).children(), strict=True)
            self._blocks = [(BlockMeter(f"{name}.{index}"), one, other) for index, (one, other) in enumerate(pairs)]

    def run(self, arguments: Arguments, mask: Tensor | None = None) -> tuple[Any, Any]:
        """Both outputs for some arguments. `mask` [B, T]: which tokens count in outputs of blocks [B, T, ...]."""
        args, kwargs = arguments
        outputs: dict[int, list[Tensor]] = {}
        with torch.no_grad():
            with self._watched(outputs, mask, candidate=False):
                reference = self.reference(*args, **kwargs)
            with self._watched(outputs, mask, candidate=True):
                candidate = self.candidate(*args, **kwargs)
        return reference, candidate

    def blocks(self) -> tuple[BlockError, ...]:
        """The errors of every block that ran, in order."""
        return tuple(meter.result() for meter, _, _ in self._blocks if meter.used)

    @contextmanager
    def _watched(self, outputs: dict[int, list[Tensor]], mask: Tensor | None, *, candidate: bool) -> Iterator[None]:
        """Hooks on every block: the reference's keep their outputs and try the other's block on the same inputs."""

        def keep(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs[index] = _tensors(output)
            meter, _, other = self._blocks[index]
            _compare(meter, outputs[index], _tensors(other(*args, **kwargs)), mask, isolated=True)

        def compare(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            _compare(self._blocks[index][0], outputs.pop(index), _tensors(output), mask, isolated=False)

        act = compare if candidate else keep
        handles = []
        for index, (_, one, other) in enumerate(self._blocks):
            block = other if candidate else one

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                act(index, args, kwargs, output)

            handles.append(block.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _compare(
    meter: BlockMeter, reference: list[Tensor], found: list[Tensor], mask: Tensor | None, *, isolated: bool
) -> None:
    for one, other in zip(reference, found, strict=True):
        counts = mask is not None and tuple(one.shape[:2]) == tuple(mask.shape)
        chosen = mask.to(one.device).bool() if mask is not None and counts else ...
        meter.add(one[chosen], other[chosen], isolated=isolated)


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a block's output: one hidden state, or one for each stream."""
    items = output if isinstance(output, tuple | list) else [output]
    return [item for item in items if isinstance(item, Tensor) and item.is_floating_point()]
