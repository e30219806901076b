"""From the tensors that an adapter file has of a layer to its change: which method they are, and that all are there.

    LoRA    lora_down [R, K], lora_up [N, R], and lora_mid [R, R, ...] of a convolution's small core
    LoHa    hada_w1_a [N, R], hada_w1_b [R, K], hada_w2_a, hada_w2_b
            with cores hada_t1, hada_t2 [R, R, ...]: hada_w1_a [R, N], hada_w1_b [R, I]
    LoKr    lokr_w1 [a, b], or lokr_w1_a [a, R] and lokr_w1_b [R, b]; lokr_w2 alike
            with a core lokr_t2 [R, R, ...]: lokr_w2_a [R, c], lokr_w2_b [R, d]
    DoRA    any of them with dora_scale [N, 1] or [1, I] (LyCORIS, OneTrainer), lora_magnitude_vector [N] (PEFT)

A file may hold several of a layer, but for a DoRA: their changes add up, each with the layer's alpha over its own R.
The scale is alpha / R, and 1 for a LoKr of two whole factors, whatever alpha says: LyCORIS writes them so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.parts import FLOATS
from lowbit.lora.adapter_delta import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta
from lowbit.lora.summed import summed

Scale = Callable[[str, int | None], float]
"""alpha / R of a layer, by its name and R; R is None where its change has no factors."""
HADA, LOKR = "hada_", "lokr_"
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_LORA = ("down", "up")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class LayerTensors:
    """The tensors that a file has of one layer: role -> key."""

    file: SafetensorsFile
    layer: str
    keys: Mapping[str, str]

    @property
    def place(self) -> str:
        """File and layer, for messages."""
        return f"{self.file.path}: layer {self.layer!r}"

    def read(self, role: str, rank: int | None = None) -> Tensor:
        """A factor. `rank`: how many axes it has to have. Raises `CheckpointError`."""
        key = self.keys[role]
        tensor = self.file.read(key)
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.place}: {key!r} is {kind}, not float of 16 or 32 bits; save the LoRA in bfloat16"
            )
        if rank is not None and tensor.dim() != rank:
            raise self.error(f"{key!r} has shape {list(tensor.shape)}, expected {rank} axes")
        return tensor

    def shapes(self, *roles: str) -> str:
        """Keys and shapes, for messages."""
        return ", ".join(f"{self.keys[r]!r} {list(self.file.tensors[self.keys[r]].shape)}" for r in roles)

    def error(self, what: str) -> CheckpointError:
        """An error about this layer."""
        return CheckpointError(f"{self.place}: {what}; download it again")


def change_of(tensors: LayerTensors, scale: Scale) -> Delta:
    """The change that a layer's tensors mean, the sum of several forms side by side.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
        UnsupportedError: magnitudes of a DoRA beside several forms.
    """
    roles = set(tensors.keys) - {"alpha"}
    magnitudes = [role for role in _MAGNITUDES if role in roles]
    if len(magnitudes) > 1:
        raise tensors.error(f"{tensors.shapes(*magnitudes)} are magnitudes twice")
    forms = [read for read, mine in _FORMS if any(role.startswith(mine) for role in roles)] or [_lora]
    if magnitudes and len(forms) > 1:
        raise UnsupportedError(
            f"{tensors.place}: {tensors.keys[magnitudes[0]]!r} makes a DoRA of one change, and there are {len(forms)} "
            "(LoRA, LoHa, LoKr) beside it, whose sum with a DoRA is not defined; keep one of them in the file"
        )
    delta = summed([(read(tensors, scale), 1.0) for read in forms], tensors.place)
    return _dora(tensors, delta, magnitudes[0]) if magnitudes else delta


def _form_of(role: str) -> str:
    """What the roles of a form have in common; "" for those of a LoRA."""
    return next((mark for mark in (HADA, LOKR) if role.startswith(mark)), "alpha" if role == "alpha" else "")


def _require(tensors: LayerTensors, *roles: str) -> None:
    """Raise `CheckpointError` for the first role of which there is no tensor."""
    if missing := next((role for role in roles if role not in tensors.keys), None):
        mine = [key for role, key in tensors.keys.items() if _form_of(role) == _form_of(missing)]
        have = (mine or list(tensors.keys.values()))[0]
        name = {"down": "lora_down (or lora_A)", "up": "lora_up (or lora_B)"}.get(missing, missing)
        raise tensors.error(f"has {have!r} without its counterpart {name}")


def _lora(tensors: LayerTensors, scale: Scale) -> LoraDelta:
    _require(tensors, *_LORA)
    down, up = tensors.read("down"), _matrix(tensors.read("up"))
    if down.dim() < 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise tensors.error(f"down {list(down.shape)} and up {list(up.shape)} do not fit [R, K] and [N, R]")
    if "mid" in tensors.keys:
        mid, pointwise = tensors.read("mid"), down.flatten(1)
        rank = down.shape[0]
        if mid.dim() < 3 or mid.shape[:2] != (rank, rank) or pointwise.shape[1] != down.shape[1]:
            raise tensors.error(f"{tensors.shapes('mid', 'down')} do not fit [R, R, ...] and [R, I]")
        down = torch.einsum("rs...,sk->rk...", mid.float(), pointwise.float())
    return LoraDelta(down, up, scale(tensors.layer, down.shape[0]))


def _loha(tensors: LayerTensors, scale: Scale) -> LohaDelta:
    _require(tensors, *_LOHA)
    cores = [role for role in ("hada_t1", "hada_t2") if role in tensors.keys]
    if cores:
        _require(tensors, "hada_t1", "hada_t2")
    first, second = (_product(tensors, f"hada_w{i}", f"hada_t{i}" if cores else "") for i in (1, 2))
    if first.shape != second.shape:
        raise tensors.error(f"its two products are {list(first.shape)} and {list(second.shape)}, expected one shape")
    return LohaDelta(first, second, scale(tensors.layer, first.rank))


def _lokr(tensors: LayerTensors, scale: Scale) -> LokrDelta:
    made: list[Tensor | LoraDelta] = []
    for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2" if "lokr_t2" in tensors.keys else "")):
        factors = [role for role in (f"{name}_a", f"{name}_b") if role in tensors.keys]
        if name in tensors.keys and factors:
            raise tensors.error(f"{tensors.shapes(name, *factors)} are a factor twice: whole, and as a product")
        if name in tensors.keys and not core:
            whole = tensors.read(name)
            if whole.dim() < 2 or (name == "lokr_w1" and whole.dim() != 2):
                raise tensors.error(f"{tensors.shapes(name)} is no matrix")
            made.append(whole)
        else:
            made.append(_product(tensors, name, core))
    ranks = [part.rank for part in made if isinstance(part, LoraDelta)]
    return LokrDelta(made[0], made[1], scale(tensors.layer, ranks[-1] if ranks else None))


def _product(tensors: LayerTensors, name: str, core: str) -> LoraDelta:
    """`name_a` [N, R] times `name_b` [R, K]; with a core [R, R, ...] they are [R, N] and [R, I]."""
    roles = (f"{name}_a", f"{name}_b")
    _require(tensors, *roles)
    a, b = (tensors.read(role, 2) for role in roles)
    if core:
        t = tensors.read(core)
        if t.dim() < 3 or t.shape[:2] != (a.shape[0], b.shape[0]) or not t.numel():
            raise tensors.error(f"{tensors.shapes(core, *roles)} do not fit [R, R, ...], [R, N] and [R, I]")
        return LoraDelta(torch.einsum("rs...,sk->rk...", t.float(), b.float()), a.t().contiguous())
    if a.shape[1] != b.shape[0] or not b.shape[0]:
        raise tensors.error(f"{tensors.shapes(*roles)} do not fit [N, R] and [R, K]")
    return LoraDelta(b, a)


def _dora(tensors: LayerTensors, delta: Delta, role: str) -> DoraDelta:
    magnitude = tensors.read(role)
    count, (n, k) = magnitude.numel(), delta.shape[:2]
    by_row = count == n and (role != "dora_scale" or magnitude.shape[:1] == (n,))
    flat = magnitude.dim() > 2 and len(delta.shape) == 2 and count > 0 and k % count == 0  # of a kernel's matrix
    if not by_row and (role != "dora_scale" or not (count == k or flat)):
        raise tensors.error(f"{tensors.shapes(role)} is neither of the {n} rows nor of the {k} columns of its change")
    return DoraDelta(delta, magnitude.reshape(-1), by_row)


_FORMS: tuple[tuple[Callable[[LayerTensors, Scale], Delta], tuple[str, ...]], ...] = (
    (_lora, (*_LORA, "mid")),
    (_loha, (HADA,)),
    (_lokr, (LOKR,)),
)
"""What reads each form, and what the roles of its tensors begin with."""


def _matrix(up: Tensor) -> Tensor:
    """The up factor of a convolution, [N, R, 1, 1], as a matrix."""
    return up.flatten(1) if up.dim() > 2 and set(up.shape[2:]) == {1} else up
