"""LoRA at run time: a low-rank branch beside the layer, whose quantized weight and kernel stay as they are.

    y = layer(x) + (x down^T) up^T            of a convolution: its own with `down` as kernel, then `up` at each place

The branch is a forward hook, so it sees the layer's own input: before a pre-quant scale, before the shift of unsigned
activations, and before any rounding. That makes it right for every format, and exact but for the rounding of its
factors to the layer's dtype. All adapters of a layer are one pair of matrices, their ranks side by side; a strength is
multiplied into `up`, in place, so that changing it costs nothing at run time and recompiles nothing.

torch.compile does not look at hooks again once a module is compiled. So a layer with a branch also changes its class,
to a subclass without anything of its own, which makes the compiler look again, and back when the branch goes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import UnsupportedError
from lowbit.lora.adapter_delta import Delta, LoraDelta
from lowbit.lora.layers import AnyAdapter, check_strength, match_module, weight_of

_ATTRIBUTE = "lora_branch"


class LoraLinear(nn.Linear):
    """An `nn.Linear` that has a branch."""


_WITH_BRANCH: dict[type, type] = {nn.Linear: LoraLinear}  # a layer's class -> its class while it has a branch


class LoraBranch(nn.Module):
    """All adapters of one layer: `down` [R, K] and `up` [N, R], buffers that follow the layer but are not saved."""

    down: Tensor
    up: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = weight_of(layer)
        for name, shape in (("down", (0, weight.shape[1:].numel())), ("up", (weight.shape[0], 0))):
            empty = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            self.register_buffer(name, empty, persistent=False)
        self._deltas: dict[int, tuple[LoraDelta, float]] = {}
        self._hook = layer.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return output + F.linear(F.linear(x, down), up).to(output.dtype)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        channel = -1 - len(layer.kernel_size)
        low: Tensor = layer._conv_forward(x, down.view(-1, *weight_of(layer).shape[1:]), None)  # noqa: SLF001
        return output + F.linear(low.movedim(channel, -1), up).movedim(-1, channel).to(output.dtype)

    def put(self, key: int, delta: LoraDelta, strength: float) -> None:
        """Add an adapter's change."""
        self._deltas[key] = delta, strength
        self._rebuild()

    def set_strength(self, key: int, strength: float) -> None:
        """Change an adapter's strength, in place."""
        self._deltas[key] = self._deltas[key][0], strength
        start = 0
        for other, (delta, _) in self._deltas.items():
            if other == key:
                with torch.no_grad():
                    self.up[:, start : start + delta.rank].copy_(_scaled_up(delta, strength))
            start += delta.rank

    def take(self, key: int) -> bool:
        """Remove an adapter's change; whether any is left."""
        del self._deltas[key]
        if not self._deltas:
            self._hook.remove()
            return False
        self._rebuild()
        return True

    def _rebuild(self) -> None:
        downs = [delta.down.flatten(1) for delta, _ in self._deltas.values()]
        ups = [_scaled_up(delta, strength) for delta, strength in self._deltas.values()]
        self.down = torch.cat([down.to(self.down.device, self.down.dtype) for down in downs])
        self.up = torch.cat([up.to(self.up.device, self.up.dtype) for up in ups], dim=1)


class LoraHandle:
    """An attached adapter. `strength` can be set; `remove()` takes it off. As a context manager it removes itself.

    Attributes: `layers`, the names of the changed layers; `unmatched`, the adapter's names that are for other models.
    """

    def __init__(
        self, layers: list[tuple[str, nn.Module, LoraDelta]], unmatched: tuple[str, ...], strength: float
    ) -> None:
        self.layers = tuple(name for name, _, _ in layers)
        self.unmatched = unmatched
        self._strength = float(strength)
        self._targets = [weakref.ref(layer) for _, layer, _ in layers]
        for _, layer, delta in layers:
            if not hasattr(layer, _ATTRIBUTE):
                _open_branch(layer)
            getattr(layer, _ATTRIBUTE).put(id(self), delta, self._strength)

    @property
    def strength(self) -> float:
        """What the change is multiplied by."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_strength(value)
        for branch in self._branches():
            branch.set_strength(id(self), float(value))
        self._strength = float(value)

    def remove(self) -> None:
        """Take the adapter off: the layers are what they were. A second call does nothing."""
        for target in self._targets:
            layer = target()
            if layer is not None and not getattr(layer, _ATTRIBUTE).take(id(self)):
                _close_branch(layer)
        self._targets = []

    def _branches(self) -> list[LoraBranch]:
        if not self._targets:
            raise UnsupportedError("the adapter was removed from its module; attach it again")
        return [getattr(layer, _ATTRIBUTE) for target in self._targets if (layer := target()) is not None]

    def __enter__(self) -> LoraHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def attach_lora(module: nn.Module, adapter: AnyAdapter, strength: float = 1.0, *, strict: bool = True) -> LoraHandle:
    """Apply an adapter at run time, beside weights that stay quantized. Others may be attached already.

    adapter: a file, what `read_adapter` made of one, or changes by layer. `strict`: as in `Adapter.match`. Compile the
    module after attaching; a strength may change afterwards.

    Raises `UnsupportedError` for an embedding, for a convolution in groups and for a change that is no thin product of
    low rank (DoRA; LoHa and LoKr of a rank too high for that), and as `read_adapter` and
    `Adapter.match`; the module is then as it was.

    >>> import torch, lowbit
    >>> from lowbit.lora import LoraDelta, attach_lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    >>> _ = lowbit.quantize_(model, "int8")
    >>> with attach_lora(model, {"0": LoraDelta(torch.ones(1, 64), torch.ones(32, 1))}, strength=0.5) as handle:
    ...     handle.layers
    ('0',)
    """
    check_strength(strength)
    found, matched = match_module(module, adapter, strict=strict)
    beside: list[tuple[str, nn.Module, LoraDelta]] = []
    for name, layer, delta in found:
        if isinstance(layer, nn.Embedding) or getattr(layer, "groups", 1) != 1:
            kind = type(layer).__name__ if isinstance(layer, nn.Embedding) else "convolution in groups"
            remedy = "bake the adapter (bake_lora), or leave this layer out of it"
            raise UnsupportedError(f"{name}: is {kind}, beside which no branch can run; {remedy}")
        beside.append((name, layer, _as_branch(name, delta)))
    return LoraHandle(beside, matched.unmatched, strength)


def _as_branch(name: str, delta: Delta) -> LoraDelta:
    """A change as the factors of a branch. Raises `UnsupportedError`."""
    low_rank = delta.low_rank()
    if low_rank is not None:
        return low_rank
    why = "rescales the weight itself" if delta.needs_weight else "has no factors thinner than the weight"
    raise UnsupportedError(
        f"{name}: its change is of the kind {delta.kind} and {why}, so it cannot run beside it; bake the adapter "
        "(bake_lora, lowbit lora bake)"
    )


def _open_branch(layer: nn.Module) -> None:
    """Give a layer a branch without any adapter yet."""
    layer.add_module(_ATTRIBUTE, LoraBranch(layer))
    kind = type(layer)
    if kind not in _WITH_BRANCH:
        _WITH_BRANCH[kind] = type(f"Lora{kind.__name__}", (kind,), {"__module__": kind.__module__})
    layer.__class__ = _WITH_BRANCH[kind]


def _close_branch(layer: nn.Module) -> None:
    """Make a layer what it was before it had a branch."""
    delattr(layer, _ATTRIBUTE)
    layer.__class__ = next(kind for kind, own in _WITH_BRANCH.items() if own is type(layer))


def _scaled_up(delta: LoraDelta, strength: float) -> Tensor:
    """up [N, R] with its factors, float32."""
    return delta.up.float() * (delta.scale * strength)
