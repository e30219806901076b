"""Load a checkpoint, quantized or plain, into a module: checked against it as a whole before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.experts import QuantizedBank
from lowbit.layer_kinds import Layer, is_conv1d, is_layer, kind_refusal, matrix_shape, repacked_op, shaped_weight
from lowbit.tensor import AUTO, QuantizedTensor, check_layout, choose_layout, repacked

from .banks import experts_of, fit_bank, load_bank
from .dialects import StoredLayer
from .dialects.base import join_key
from .pipeline import Unit, run_units
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Component, Source, open_source
from .weight_shape import KERNEL, TURNED, may_pad, plain_shape

OPTIONS = "lowbit_options"  # attribute of a layer: a format's name, and what the checkpoint says besides it, for saving
_SHOWN = 5
_IN_WORK = 256 << 20  # bytes of layers that are read and unpacked at the same time


@dataclass(frozen=True)
class LoadReport:
    """What `load` did: quantized layers with their specs, plain tensors loaded, keys skipped, and repairs in words."""

    quantized: dict[str, str]
    plain: list[str]
    missing: list[str]
    unexpected: list[str]
    notes: list[str]


def load(
    module: nn.Module,
    path: str | Path,
    *,
    strict: bool = True,
    prefix: str | None = None,
    component: str | None = None,
    layout: str = AUTO,
) -> LoadReport:
    """Load a checkpoint into `module`: its quantized layers become `QuantizedTensor` weights, the rest is copied.

    `path` is a safetensors file, an index, or a model folder (`component` names the subfolder where there are several).
    `prefix` is what the file's keys have in front of the module's names; by default it is found. A bare `nn.Linear` or
    `nn.Embedding` takes a file with one layer. Plain tensors are copied into the module's, in its dtype; quantized
    payloads are never cast. With `strict`, keys that the module lacks (those without the prefix, too) and names that
    the file lacks are errors; without it they are left out.

    `layout`: "auto" packs each weight, as it is read, for the kernels on the device that the module is on; "plain"
    leaves it as formats have it, for a module that is to be moved to another device. `lowbit.nn.repack_` changes it.

    Everything is checked first: raises `CheckpointError`, `FormatError`, `PartsError` or `UnknownFormatError` naming
    file, layer, expectation and remedy, and leaves the module as it was.
    """
    check_layout(layout)
    with open_source(path) as source:
        content = look_for_layers(source, _component(source, component))
        loader = _Loader(module, content, str(path), prefix, strict=strict)
        loader.check(strict=strict)
        return loader.apply(layout)


def _component(source: Source, name: str | None) -> Component:
    if name is not None or len(source.components) == 1:
        return source.components[0] if name is None else source.component(name)
    known = ", ".join(component.name for component in source.components)
    raise CheckpointError(
        f"{source.root}: holds several models ({known}); choose one, such as load(..., component=...)"
    )


class _Loader:
    """The match of a file's keys with a module's names, and the tensors to put in place."""

    def __init__(
        self, module: nn.Module, content: QuantizedComponent, where: str, prefix: str | None, *, strict: bool
    ) -> None:
        self.module, self.content, self.where = module, content, where
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.state = {name: value for name, value in module.state_dict(keep_vars=True).items() if value is not None}
        keys = [*content.found.plain, *(join_key(layer, "weight") for layer in content.layers)]
        keys += [name for name, stored in content.layers.items() if experts_of(stored)]
        self.prefix = _find_prefix(keys, self.state) if prefix is None else prefix
        self.notes: list[str] = []
        self.banks: dict[str, StoredLayer] = {}  # by the name of the parameter
        self.layers, self.plain, self.unexpected = self._by_name(strict=strict)

    def _by_name(self, *, strict: bool) -> tuple[dict[str, StoredLayer], dict[str, str], list[str]]:
        """The file's layers and plain keys by the module's names, and the keys that are not for this module."""
        layers: dict[str, StoredLayer] = {}
        plain: dict[str, str] = {}
        others: list[str] = []
        # A buffer that the module makes by itself (positions 0, 1, 2 ...) is not taken from a file with an old one.
        self_made = {name for name, _ in self.module.named_buffers()} - self.state.keys()
        for key, layer in self.content.layers.items():
            name = _strip(join_key(key, ""), self.prefix)
            bank = None if name is None or not experts_of(layer) else name.removesuffix(".")
            if bank is not None and bank not in self.modules and bank in self.state:
                self.banks[bank] = layer
            elif bank is not None and join_key(bank, "weight") in self.state:
                self.banks[join_key(bank, "weight")] = layer
            elif name is None or (not strict and name.removesuffix(".") not in self.modules):
                others.append(join_key(key, "weight"))
            else:
                layers[name.removesuffix(".")] = layer
        folding = [name for name, stored in layers.items() if stored.format.folds_bias]
        shared = self._sharing() if folding else {}
        new_biases = {join_key(other, "bias") for name in folding for other in shared.get(name, [name])}
        for key in self.content.found.plain:
            name = _strip(key, self.prefix)
            if name in self_made:
                self.notes.append(f"{key}: left out, the module makes it by itself")
            elif name is None or (name not in self.state and name not in new_biases):
                others.append(key)
            else:
                plain[name] = key
        return layers, plain, others

    def _sharing(self) -> dict[str, list[str]]:
        """For each layer with a weight the names of all layers that have the same, its own included."""
        names: dict[int, list[str]] = {}
        for key, value in self.state.items():
            layer, _, attribute = key.rpartition(".")
            if attribute == "weight":
                names.setdefault(id(value), []).append(layer)
        return {name: group for group in names.values() for name in group}

    def check(self, *, strict: bool) -> None:
        """Raise `CheckpointError` for the first thing that does not fit; change nothing."""
        for name, stored in self.layers.items():
            layer = self._target(name, stored)
            self.layers[name] = _fit_shape(stored, layer)
        for name, stored in self.banks.items():
            self.banks[name] = fit_bank(stored, tuple(self.state[name].shape))
        covered = {join_key(name, "weight") for name in self.layers} | set(self.plain) | set(self.banks)
        tied = {id(self.state[name]) for name in covered if name in self.state}
        self.missing = [n for n, value in self.state.items() if n not in covered and id(value) not in tied]
        if strict and self.missing:
            raise CheckpointError(
                f"{self.where}: lacks {_some(self.missing)} (prefix {self.prefix!r}); load the right file, name the "
                "prefix, or pass strict=False"
            )
        if strict and self.unexpected:
            raise CheckpointError(
                f"{self.where}: has {_some(self.unexpected)} that the module lacks (prefix {self.prefix!r}); "
                "load it into the right model, name the prefix, or pass strict=False"
            )
        for name, key in self.plain.items():
            self._check_plain(name, key)

    def _target(self, name: str, stored: StoredLayer) -> Layer:
        layer = self.modules.get(name)
        if experts_of(stored):
            raise CheckpointError(
                f"{stored.place}: is a bank of experts, and the module has no parameter {name!r} for it; load it into "
                "the right model"
            )
        if layer is None:
            raise CheckpointError(
                f"{stored.place}: the module has no {name!r}; load it into the right model, or name the prefix"
            )
        if not is_layer(layer) or _kind(layer) != (bool(stored.options.get(KERNEL)), bool(stored.options.get(TURNED))):
            raise CheckpointError(
                f"{stored.place}: is quantized, but the module's {name!r} is a {type(layer).__name__}; only nn.Linear "
                "and nn.Embedding hold quantized matrices, and convolutions the kernels that lowbit.save wrote: "
                "convert with this layer kept"
            )
        self._check_kinds(join_key(name, "weight"), stored)
        return layer

    def _check_kinds(self, key: str, stored: StoredLayer) -> None:
        """Raise `CheckpointError` when a layer that gets this weight, or shares it, cannot work with it."""
        weight = self.state.get(key)
        for other in [name for name, value in self.state.items() if value is weight]:
            owner = self.modules[other.rpartition(".")[0]]
            why = kind_refusal(owner, stored.format) if is_layer(owner) else None
            if why is not None:
                raise CheckpointError(
                    f"{stored.place}: the module's {other!r} belongs to {why}; convert it to another format"
                )

    def _check_plain(self, name: str, key: str) -> None:
        if name not in self.state:
            return
        spec, have = self.content.specs[key], self.state[name]
        if tuple(spec.shape) != tuple(have.shape):
            raise CheckpointError(
                f"{self.where}: {key!r} has shape {list(spec.shape)}, the module's {name!r} has {list(have.shape)}; "
                "load it into the right model"
            )
        if spec.dtype.is_floating_point != have.is_floating_point():
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (spec.dtype, have.dtype))
            raise CheckpointError(
                f"{self.where}: {key!r} is {found}, the module's {name!r} is {wanted}; load it into the right model"
            )

    def apply(self, layout: str) -> LoadReport:
        """Read everything, packed as `layout` says, then put it in place."""
        weights = self._weights(layout)
        banks = {name: self._bank(name, stored) for name, stored in self.banks.items()}
        plain = {name: self._plain(name, key) for name, key in self.plain.items()}
        for name, weight in weights.items():
            layer = self.modules[name]
            self._replace(join_key(name, "weight"), weight)
            setattr(layer, OPTIONS, (weight.format.name, self.layers[name].options))
        for name, tensor in [*banks.items(), *plain.items()]:
            self._replace(name, tensor)
        described = {**self.layers, **self.banks}
        return LoadReport(
            quantized={name: stored.format.spec for name, stored in described.items()},
            plain=list(plain),
            missing=self.missing,
            unexpected=self.unexpected,
            notes=[*self.notes, *self.content.found.notes, *(note for s in described.values() for note in s.notes)],
        )

    def _weights(self, layout: str) -> dict[str, QuantizedTensor]:
        """All quantized weights, several read, unpacked and packed at a time."""
        found: dict[str, QuantizedTensor] = {}

        def read(name: str, stored: StoredLayer, chosen: str) -> None:
            found[name], _ = repacked(self._quantized(name, stored), chosen)

        owners: dict[int, list[nn.Module]] = {}
        for name, value in self.state.items():
            owners.setdefault(id(value), []).append(self.modules[name.rpartition(".")[0]])
        units = []
        for name, stored in self.layers.items():
            current = self.state[join_key(name, "weight")]
            op, device = repacked_op(owners[id(current)]), "cpu" if current.is_meta else current.device.type
            chosen = "" if op is None else choose_layout(layout, stored.format, stored.shape, device, op)[0]
            size = sum(self.content.specs[key].nbytes for key in stored.keys.values())
            units.append(Unit(name, size, (3 if chosen else 2) * size, partial(read, name, stored, chosen)))
        run_units(units, budget=_IN_WORK, recycle=False)
        return {name: found[name] for name in self.layers}

    def _quantized(self, name: str, stored: StoredLayer) -> QuantizedTensor:
        parts = self.content.load(stored)
        current = self.state[join_key(name, "weight")]
        if current.device.type not in ("cpu", "meta"):
            parts = {name: part.to(current.device) for name, part in parts.items()}
        return shaped_weight(self.modules[name], parts, stored.format, current.dtype)

    def _bank(self, name: str, stored: StoredLayer) -> QuantizedBank:
        assert self.content.dialect is not None  # a layer was found, so there is one
        current = self.state[name]
        bank = load_bank(self.content.dialect, stored, self.content.read, current.dtype)
        return bank if current.device.type in ("cpu", "meta") else bank.to(current.device)  # type: ignore[return-value]

    def _plain(self, name: str, key: str) -> Tensor:
        tensor, current = self.content.read(key), self.state.get(name)
        if current is None:  # a bias that a layer without one needs for the shift of its activations
            current = self.state[name.removesuffix("bias") + "weight"]
        device = torch.device("cpu") if current.device.type == "meta" else current.device
        return tensor.to(device, current.dtype)

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Copy into the parameter or buffer of this name, or replace it wherever the module has the same object."""
        old = self.state.get(name)
        frozen = isinstance(tensor, QuantizedTensor | QuantizedBank)
        if old is not None and _can_be_written(old) and not frozen:
            old.detach().copy_(tensor)
            return
        trains = old is not None and old.requires_grad and not frozen
        is_parameter = old is None or isinstance(old, nn.Parameter)
        new = nn.Parameter(tensor, requires_grad=trains) if is_parameter else tensor
        for other in [n for n, value in self.state.items() if value is old] or [name]:
            owner, _, attribute = other.rpartition(".")
            setattr(self.modules[owner], attribute, new)


def _kind(layer: Layer) -> tuple[bool, bool]:
    """Whether a layer's weight is a kernel, and whether it is [K, N]."""
    return layer.weight.dim() > 2, is_conv1d(layer)


def _fit_shape(stored: StoredLayer, layer: Layer) -> StoredLayer:
    """The stored layer at the module's shape. Where the file only tells the padded shape, the module's is right."""
    n, k = matrix_shape(layer)
    wanted = tuple(layer.weight.shape)
    if KERNEL in stored.options and plain_shape(stored) != wanted:
        raise CheckpointError(
            f"{stored.place}: holds a kernel of shape {stored.options[KERNEL]}, the module expects {list(wanted)}; "
            "load it into the right model"
        )
    if stored.shape != (n, k) and not (stored.padded and may_pad(stored.shape, (n, k))):
        raise CheckpointError(
            f"{stored.place}: holds a weight of shape {list(stored.shape)}, the module expects {[n, k]}; "
            "load it into the right model"
        )
    return replace(stored, shape=(n, k))


def _strip(key: str, prefix: str) -> str | None:
    """A key of the file as a name of the module, or None for one without the prefix."""
    return key[len(prefix) :] if key.startswith(prefix) else None


def _can_be_written(old: Tensor) -> bool:
    """Whether a tensor can take values where it is, so that optimizers and others that hold it see them."""
    if isinstance(old, QuantizedTensor | QuantizedBank) or old.is_meta or old.is_inference():
        return False
    return old.is_contiguous()  # not expanded: one memory location for several elements


def _find_prefix(keys: Iterable[str], names: Mapping[str, object]) -> str:
    """What most keys have in front of names of the module; "" when they match as they are."""
    counts: dict[str, int] = {}
    for key in keys:
        pieces = key.split(".")
        for index in range(len(pieces)):
            if ".".join(pieces[index:]) in names:
                front = "".join(f"{piece}." for piece in pieces[:index])
                counts[front] = counts.get(front, 0) + 1
                break
    return max(counts, key=lambda front: (counts[front], -len(front)), default="")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
