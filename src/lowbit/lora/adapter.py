"""What an adapter is once it is read: a change for each of some layers (`adapter_delta`), found by the layer's name.

    W' = W + strength * scale * up down            of a LoRA: down [R, K], up [N, R], scale = alpha / R

Names in adapter files are those of a model somewhere in a program: with that program's prefix, or with underscores for
dots. `Adapter.match` finds the layers of a model or checkpoint at hand that they mean, and never guesses: a name that
could mean two layers is an error that lists them. Parts of projections that the model holds fused are put together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.errors import CheckpointError, WeightError
from lowbit.lora.adapter_delta import Delta
from lowbit.lora.fused import fused_delta, fused_layers
from lowbit.lora.summed import summed

# What programs put before the name of a layer of the denoiser (or of a language model), longest first.
_PREFIXES = (
    "base_model.model.model.diffusion_model.",
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.unet.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
)
_TEXT_PREFIXES = ("text_encoder", "text_encoders", "te1", "te2", "te3", "te", "clip_l", "clip_g", "t5xxl")
_KOHYA = ("lora_prior_unet_", "lora_transformer_", "lora_unet_", "lycoris_", "lora_te1_", "lora_te2_", "lora_te3_")
_KOHYA_PLAIN = ("lora_te_", "lora_")
_KOHYA_TEXT = ("lora_te1_", "lora_te2_", "lora_te3_", "lora_te_")
_SHOWN = 4


@dataclass(frozen=True)
class Adapter:
    """An adapter as its file names the layers; `where` is the file. `notes`: what was assumed, in words."""

    layers: Mapping[str, Delta]
    where: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    def match(self, shapes: Mapping[str, Sequence[int]], *, strict: bool = True) -> Matched:
        """The changes by the names of layers at hand. shapes: a layer's name -> the logical shape of its weight.

        Layers of another model (a text encoder's in a file for a pipeline, where the denoiser is at hand, or the other
        way round) are left over. With `strict` any other layer without a match is an error.

        Raises:
            CheckpointError: no layer matches, a name means several layers, two names mean one, or (`strict`) a layer
                has no match.
            WeightError: a change does not have its layer's shape.
        """
        found = self.find(shapes)
        self.check(found.names, shapes, strict=strict)
        return found

    def find(self, shapes: Mapping[str, Sequence[int]]) -> Matched:
        """`match` that does not mind layers without a match."""
        names = _Names(shapes)
        found: dict[str, Delta] = {}
        layer_of: dict[str, str] = {}
        for own, delta in self.layers.items():
            name = names.find(own, self.where)
            if name is None:
                continue
            if name in found:
                first = next(other for other, layer in layer_of.items() if layer == name)
                raise CheckpointError(f"{self.where}: {first!r} and {own!r} both change {name!r}; remove one")
            if not _fits(delta.shape, tuple(shapes[name])):
                raise WeightError(
                    f"{self.where}: {own!r} changes a weight {list(delta.shape)}, but {name!r} is "
                    f"{list(shapes[name])}; this LoRA is for another model"
                )
            found[name], layer_of[own] = delta, name
        left = [own for own in self.layers if own not in layer_of]
        for name, (parts, owns) in fused_layers(left, lambda own: names.find(own, self.where), self.where).items():
            present, where = {part: self.layers[own] for part, own in owns.items()}, f"{self.where}: {name!r}"
            delta = fused_delta(parts, present, shapes[name], where)
            found[name] = summed([(found[name], 1.0), (delta, 1.0)], where) if name in found else delta
            layer_of |= dict.fromkeys(owns.values(), name)
        return Matched(found, tuple(own for own in left if own not in layer_of), layer_of)

    def check(self, used: Collection[str], layers: Iterable[str], *, strict: bool) -> None:
        """Raise `CheckpointError` unless enough was found. used: those of the adapter's names that found a layer."""
        kinds = {_is_text(own) for own in used}
        stray = [own for own in self.layers if own not in used and (not kinds or _is_text(own) in kinds)]
        there = _some(list(layers))
        if not used:
            raise CheckpointError(
                f"{self.where}: none of its {len(self.layers)} layers ({_some(stray)}) is a layer of the model "
                f"({there}); this LoRA is for another model, or for the same one with other names: convert its names "
                "first"
            )
        if strict and stray:
            raise CheckpointError(
                f"{self.where}: {len(stray)} of its {len(self.layers)} layers are none of the model's "
                f"({_some(stray)}); the model has {there}. Take the LoRA for this model, or pass strict=False "
                f"(--no-strict) to use the {len(used)} that fit"
            )


@dataclass(frozen=True)
class Matched:
    """Changes by layer; the adapter's own names of those that are for no layer here; the layers of the others."""

    layers: dict[str, Delta]
    unmatched: tuple[str, ...]
    names: dict[str, str]


def combined(adapters: Iterable[tuple[Mapping[str, Delta], float]]) -> dict[str, Delta]:
    """Several matched adapters, each with its strength, as one, which is rounded once where it is baked.

    A layer's change is a LoRA, ranks side by side, where each of the adapters' can be written as one.

    Raises `UnsupportedError` for a DoRA of a layer that another adapter changes too, `WeightError` for changes of
    different shapes.
    """
    by_layer: dict[str, list[tuple[Delta, float]]] = {}
    for layers, strength in adapters:
        for name, delta in layers.items():
            by_layer.setdefault(name, []).append((delta, strength))
    made = {}
    for name, changes in by_layer.items():
        thin = [(low, strength) for delta, strength in changes if (low := delta.low_rank()) is not None]
        made[name] = summed(thin if len(thin) == len(changes) else changes, name)
    return made


class _Names:
    """The layers at hand, by every way in which an adapter may write their names."""

    def __init__(self, shapes: Mapping[str, object]) -> None:
        self._exact: dict[str, list[str]] = {}
        self._flat: dict[str, list[str]] = {}
        for name in shapes:
            short = _without(name, _PREFIXES)
            for spelled in {name, short}:
                self._exact.setdefault(spelled, []).append(name)
                self._flat.setdefault(spelled.replace(".", "_"), []).append(name)

    def find(self, own: str, where: str) -> str | None:
        """The layer that an adapter's name means, or None. Raises `CheckpointError` if it could be several."""
        for spelled, known in self._spellings(own):
            candidates = known.get(spelled, [])
            if spelled in candidates:
                return spelled
            if len(candidates) > 1:
                raise CheckpointError(
                    f"{where}: {own!r} could mean {' or '.join(map(repr, candidates))}; rename it in the adapter "
                    "as the layer that it is for"
                )
            if candidates:
                return candidates[0]
        return None

    def _spellings(self, own: str) -> list[tuple[str, dict[str, list[str]]]]:
        flat = "." not in own
        if flat:
            short = _without(own, (*_KOHYA, *_KOHYA_PLAIN))
            known = [(own, self._flat), (short, self._flat)]
            return [*known, *((_without(short, [p.replace(".", "_") for p in _PREFIXES]), self._flat),)]
        short = _without(own, _PREFIXES)
        text = own.partition(".")[2] if own.partition(".")[0] in _TEXT_PREFIXES else own
        bare = _without(short, _PREFIXES)  # "base_model.model." before a "model." that the module itself lacks
        return [(spelled, self._exact) for spelled in dict.fromkeys((own, short, bare, text))]


def _without(name: str, prefixes: Iterable[str]) -> str:
    """A name without the first of the prefixes that it has, and with something left."""
    for prefix in prefixes:
        if name.startswith(prefix) and len(name) > len(prefix):
            return name[len(prefix) :]
    return name


def _is_text(own: str) -> bool:
    """Whether an adapter's name says that it is for a text encoder."""
    head = own.removeprefix("base_model.model.").partition(".")[0]
    return own.startswith(_KOHYA_TEXT) or head in _TEXT_PREFIXES or head.startswith("text_encoder")


def _fits(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a change is that of a weight: of its shape, or of its matrix, as LoHa and LoKr are of kernels.

    A 1x1 convolution and a linear may stand for each other.
    """

    def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if all(size == 1 for size in shape[2:]) else shape

    flat = len(change) == 2 and change == (weight[0], math.prod(weight[1:]))
    return change == weight or flat or matrix(change) == matrix(weight)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
