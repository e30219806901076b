"""Baking an adapter into the weights of a module, quantized or not, and taking it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError
from lowbit.lora.adapter_delta import Delta
from lowbit.lora.bake_layer import LayerBake, bake_plain, bake_weight, baked_format
from lowbit.lora.layers import Adaptable, AnyAdapter, adaptable_layers, check_strength, match_module
from lowbit.lora.summed import summed
from lowbit.tensor import QuantizedTensor

_STACK = "_lowbit_baked"  # on a layer: the handles whose adapters are in it, in order


@dataclass(frozen=True)
class _Change:
    """New parameters of one layer, and the ones that they replace; a bias of None stays as it is."""

    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    old_weight: nn.Parameter | None
    old_bias: nn.Parameter | None


class BakedHandle:
    """An adapter that was baked in. `layers`: what became of each; `unmatched`: names that are for other models."""

    def __init__(
        self, layers: Mapping[str, LayerBake], unmatched: tuple[str, ...], changes: list[_Change], *, kept: bool
    ) -> None:
        self.layers = dict(layers)
        self.unmatched = unmatched
        self._changes = changes if kept else []
        self._kept, self._baked = kept, True
        for change in changes:
            _put(change.layer, change.weight, change.bias)
            setattr(change.layer, _STACK, (*getattr(change.layer, _STACK, ()), id(self)))

    @property
    def recovered(self) -> float:
        """The least that a layer has of its change; 1 is all of it."""
        return min((layer.recovered for layer in self.layers.values()), default=1.0)

    def unbake(self) -> None:
        """Put the weights and biases back that were there before, bit for bit; the last one baked goes first.

        Raises `UnsupportedError` when nothing was kept, after an earlier call, or while a later bake is in the way.
        """
        if not self._kept or not self._baked:
            why = "it was unbaked already" if self._kept else "no originals were kept (keep_original=False)"
            raise UnsupportedError(f"this adapter cannot be taken out: {why}; load the model again")
        for change in self._changes:
            if getattr(change.layer, _STACK, ())[-1:] != (id(self),):
                raise UnsupportedError("another adapter was baked in after this one; unbake that one first")
        for change in self._changes:
            device = _device(change.layer)
            _put(change.layer, _on(change.old_weight, device), _on(change.old_bias, device))
            if change.bias is not None and change.old_bias is None:
                change.layer.register_parameter("bias", None)
            stack = getattr(change.layer, _STACK)[:-1]
            setattr(change.layer, _STACK, stack) if stack else delattr(change.layer, _STACK)
        self._changes, self._baked = [], False


def bake_lora(
    module: nn.Module,
    adapter: AnyAdapter,
    strength: float = 1.0,
    *,
    rounding: str | None = None,
    seed: int = 0,
    keep_original: bool = True,
    strict: bool = True,
) -> BakedHandle:
    """Add an adapter to the weights of a module, in place; layers keep their formats.

    adapter, strict: as in `attach_lora`; several at once with `combined`. Of a DoRA, `strength` is how far the weight
    goes from what it is to what the DoRA makes of it. A weight that several layers share takes the sum of their
    changes. rounding: "low_rank" (svdquant_w4a4 only, its default for a LoRA: exact, the rank grows),
    "error_feedback", "stochastic" or "nearest", see `bake_layer`; by default the best for each layer. keep_original:
    hold the old weights, so that `unbake` can put them back.

    Scales stay where the sum fits between the smallest and the largest code, or where a larger scale would cost more;
    `BakedHandle.layers` says where not. What stored biases hold of the weight (`act_unsigned`) is brought up to date.

    Raises `FormatError` for a format that cannot be written, and as `read_adapter` and `Adapter.match`; the module is
    then as it was.
    """
    check_strength(strength)
    found, matched = match_module(module, adapter, strict=strict)
    shared = _by_weight(found)
    for name, layer, delta, _ in shared:
        if isinstance(layer.weight, QuantizedTensor):
            baked_format(layer.weight.format, delta, layer.weight.matrix, rounding, name)
    owners = _owners(module)
    changes: list[_Change] = []
    accounts: dict[str, LayerBake] = {}
    done: list[tuple[nn.Parameter, Tensor | None, list[Adaptable]]] = []
    for name, layer, delta, names in shared:
        weight, gain, account = _baked(name, layer, delta, strength, rounding, seed)
        done.append((weight, gain, owners[id(layer.weight)]))
        accounts |= dict.fromkeys(names, account)
    for weight, gain, mine in done:
        for layer in mine:
            bias = _moved_bias(layer, gain)
            old_bias = None if bias is None else _parameter(layer, "bias")
            old = (_parameter(layer, "weight"), old_bias) if keep_original else (None, None)
            changes.append(_Change(layer, weight, bias, *old))
    return BakedHandle(accounts, matched.unmatched, changes, kept=keep_original)


def _by_weight(found: Sequence[tuple[str, Adaptable, Delta]]) -> list[tuple[str, Adaptable, Delta, list[str]]]:
    """One change for each weight, the sum where several layers share it: first name, layer, change, all names."""
    groups: dict[int, list[tuple[str, Adaptable, Delta]]] = {}
    for entry in found:
        groups.setdefault(id(entry[1].weight), []).append(entry)
    made = []
    for group in groups.values():
        names = [name for name, _, _ in group]
        total = summed([(delta, 1.0) for _, _, delta in group], " and ".join(names))
        made.append((names[0], group[0][1], total, names))
    return made


def _baked(
    name: str, layer: Adaptable, delta: Delta, strength: float, rounding: str | None, seed: int
) -> tuple[nn.Parameter, Tensor | None, LayerBake]:
    """A layer's weight with a change in it, what the bias has to gain, and the account."""
    weight = _parameter(layer, "weight")
    assert weight is not None
    if not isinstance(weight, QuantizedTensor):
        new, account = bake_plain(weight.detach(), delta, strength, name)
        return nn.Parameter(new, requires_grad=weight.requires_grad), None, account
    plain = weight.in_layout("")
    made = bake_weight(plain.format, plain.parts, plain.matrix, delta, strength, rounding, seed=seed, where=name)
    tensor = plain.with_parts(made.parts, fmt=made.format, view_of="", room=0).in_layout(weight.kernel_layout)
    return nn.Parameter(tensor, requires_grad=False), made.bias_change, made.account


def _moved_bias(layer: Adaptable, gain: Tensor | None) -> nn.Parameter | None:
    """The bias with what the weight's share in it changed by, or None where it stays."""
    if gain is None or not isinstance(layer, nn.Linear):
        return None
    bias: Tensor | None = layer.bias
    old = torch.zeros_like(gain) if bias is None else bias.detach().float()
    dtype = layer.weight.dtype if bias is None else bias.dtype
    return nn.Parameter((old + gain).to(dtype), requires_grad=bias is not None and bias.requires_grad)


def _owners(module: nn.Module) -> dict[int, list[Adaptable]]:
    """The layers by the identity of their weights, each layer once."""
    found: dict[int, list[Adaptable]] = {}
    for layer in {id(layer): layer for layer in adaptable_layers(module).values()}.values():
        found.setdefault(id(layer.weight), []).append(layer)
    return found


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    """A layer's own parameter of a name, or None."""
    return dict(layer.named_parameters(recurse=False)).get(name)


def _put(layer: nn.Module, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
    if weight is not None:
        layer.weight = weight
    if bias is not None:
        layer.bias = bias


def _device(layer: nn.Module) -> torch.device:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.device


def _on(parameter: nn.Parameter | None, device: torch.device) -> nn.Parameter | None:
    """A kept parameter where its layer is now."""
    if parameter is None or parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
