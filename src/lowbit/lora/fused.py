"""Adapters for separate projections on models that hold them fused: rows of q, k and v one below the other.

Quantized checkpoints often join what reads the same input (nunchaku's do), while adapters are trained on the parts. The
change of the whole is that of the parts, each on its own rows; parts without a change leave theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lowbit.errors import CheckpointError, WeightError
from lowbit.lora.adapter_delta import Delta, LoraDelta, RowsDelta

_PARTS = {  # the name of a fused projection -> its parts, in the order of their rows
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused_layers(
    owns: Sequence[str], find: Callable[[str], str | None], where: str
) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Fused layers that some of an adapter's names are parts of: layer -> (its parts, part -> the adapter's name).

    Raises `CheckpointError` where two names mean the same part. `where` names the adapter.
    """
    found: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    for own in owns:
        for whole, parts in _PARTS.items():
            part = next((part for part in parts if own.endswith((f".{part}", f"_{part}"))), None)
            name = None if part is None else find(own[: -len(part)] + whole)
            if part is None or name is None:
                continue
            # "add_q_proj" of "add_qkv_proj" also reads as "q_proj" of "qkv_proj" behind "add_": it is one part.
            mine = found.setdefault(name, (parts, {}))[1]
            if own in mine.values():
                continue
            if part in mine:
                raise CheckpointError(
                    f"{where}: {mine[part]!r} and {own!r} both change the part {part} of {name!r}; remove one"
                )
            mine[part] = own
    return found


def fused_delta(parts: Sequence[str], present: Mapping[str, Delta], shape: Sequence[int], where: str) -> Delta:
    """One change for a fused weight [N, K] from those of its parts. Absent parts share the other rows equally.

    Raises `WeightError` where the rows do not add up.
    """
    n, absent = shape[0], [part for part in parts if part not in present]
    rest = n - sum(delta.shape[0] for delta in present.values())
    columns = {delta.shape[1:] for delta in present.values()}
    if columns != {tuple(shape[1:])} or rest < 0 or (rest % len(absent) if absent else rest):
        shapes = ", ".join(f"{part} {list(delta.shape)}" for part, delta in present.items())
        raise WeightError(f"{where}: the changes of {shapes} do not fit the fused weight {list(shape)}")
    placed: list[tuple[int, Delta]] = []
    start = 0
    for part in parts:
        delta = present.get(part)
        if delta is not None:
            placed.append((start, delta))
        start += rest // len(absent) if delta is None else delta.shape[0]
    whole = RowsDelta(placed, n)
    low_rank = whole.low_rank() if all(isinstance(delta, LoraDelta) for _, delta in placed) else None
    return whole if low_rank is None else low_rank
