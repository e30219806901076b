"""Which layers of a plan share one smooth_factor and one proj_down: those of svdquant_w4a4 that read the same input.

Statistics know which do. Without them names tell, as transformers, diffusers and the models' own files use them: query,
key and value (`to_q to_k to_v`, `q_proj k_proj v_proj`, also with add_, img_ or txt_ in front), gate and up. Of an
attention to something else, such as a text, query reads another input than key and value. Layers of several blocks do
not share, though all blocks may read one conditioning vector.

>>> from lowbit.checkpoint.shared_low_rank import group_name
>>> group_name(["blocks.0.attn.to_q", "blocks.0.attn.to_k"])
'blocks.0.attn.to_q+to_k'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from lowbit.errors import PlanError
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.solvers import STARTS

from .layer_statistics import LayerStatistics, knowledge
from .tensor_plan import TensorPlan
from .weight_shape import MATRIX_AXES

OPTION = "--share-low-rank"
_QKV = re.compile(r"^(?P<head>(?:\w*_)?)(?P<role>q|k|v|query|key|value)(?P<tail>|_proj|_lin|_linear)$")
_SHORT = {"wq": "w*", "wk": "w*", "wv": "w*", "w1": "gate", "w3": "gate", "gate_proj": "gate", "up_proj": "gate"}
_QUERY = ("q", "query")
_CROSS = re.compile(r"attn2|cross|encoder_attn|encdec", re.IGNORECASE)
_BLOCK = re.compile(r"(?:^|\.)\w*(?:blocks?|layers?|blk|h|stages?)\.\d+(?=\.)")
_NUMBERED = re.compile(r"^.*?\.?\d+(?=\.)")


@runtime_checkable
class KnowsInputs(Protocol):
    """Statistics that know which layers read the same input."""

    def input_of(self, layer: str, /) -> str | None:
        """The name of a layer's input, which others may have too; None for a layer without statistics."""
        ...


def share_low_rank(
    component: str, tensors: Sequence[TensorPlan], statistics: LayerStatistics | None
) -> tuple[TensorPlan, ...]:
    """The plans of a component's tensors, those with the same input in groups (`TensorPlan.shares`)."""
    groups: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        if not _can_share(tensor):
            continue
        read = _input(f"{component}/{tensor.layer}" if component else tensor.layer, tensor.layer, statistics)
        if read is not None:
            groups.setdefault((read, *_kind(tensor)), []).append(tensor)
    shares: dict[str, str] = {}
    for found in groups.values():
        if len(found) > 1:
            shares |= dict.fromkeys((tensor.key for tensor in found), group_name([tensor.layer for tensor in found]))
    return tuple(_sharing(tensor, shares[tensor.key]) if tensor.key in shares else tensor for tensor in tensors)


def groups_of(tensors: Iterable[TensorPlan]) -> dict[str, list[TensorPlan]]:
    """The groups of two and more layers that are to share, by name."""
    found: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        if tensor.action == "quantize" and tensor.shares:
            found.setdefault(tensor.shares, []).append(tensor)
    return {name: group for name, group in found.items() if len(group) > 1}


def check_groups(tensors: Iterable[TensorPlan]) -> None:
    """Raise `PlanError` for a group of layers that cannot share, which an edited plan may have."""
    for name, group in groups_of(tensors).items():
        for tensor in group:
            if not _can_share(tensor):
                raise PlanError(
                    f"plan: tensor {tensor.key!r} is to share {name!r}, and only matrices of svdquant_w4a4 by one of "
                    f"{', '.join(STARTS)} do, with or without refinements; take 'shares' out of it"
                )
            if _kind(tensor) != _kind(group[0]):
                raise PlanError(
                    f"plan: tensors {group[0].key!r} and {tensor.key!r} are to share {name!r}, and differ in format, "
                    "solver, dtype or the number of columns; take 'shares' out of one"
                )


def check_inputs(component: str, tensors: Iterable[TensorPlan], statistics: LayerStatistics | None) -> list[str]:
    """Notes on the groups of which nobody knows that their layers read the same input: no statistics, no such names.

    Raises `PlanError` for a group of which statistics know that they do not, as an edited plan may have it: the file
    would be valid, and every layer worse than with a low rank of its own.
    """
    found = []
    inputs: object = statistics
    for name, group in groups_of(tensors).items():
        read: dict[str, TensorPlan] = {}
        for tensor in group:
            full = f"{component}/{tensor.layer}" if component else tensor.layer
            known = inputs.input_of(full) if isinstance(inputs, KnowsInputs) else None
            if known is not None:
                read.setdefault(known, tensor)
        if len(read) > 1:
            first, other = list(read.values())[:2]
            raise PlanError(
                f"plan: tensors {first.key!r} and {other.key!r} are to share {name!r}, and by the statistics they read "
                "different inputs; take 'shares' out of one, or plan anew"
            )
        by_name = {_input_by_name(tensor.layer) for tensor in group}
        if not read and (len(by_name) > 1 or None in by_name):
            found.append(
                f"{name}: neither statistics nor names tell that these layers read the same input, and sharing costs "
                "quality where they do not; give --stats to have it checked"
            )
    return found


def notes(groups: dict[str, list[TensorPlan]]) -> list[str]:
    """What a plan says about its groups. Raises `PlanError` when there are none, for somebody wanted some."""
    if not groups:
        raise PlanError(
            f"{OPTION}: no two layers of svdquant_w4a4 read the same input, as far as statistics or names tell; leave "
            "the option out, choose that format, or calibrate and give --stats"
        )
    count, example = sum(map(len, groups.values())), next(iter(groups))
    return [f"{count} layers in {len(groups)} groups share smooth_factor and proj_down, such as {example}"]


def group_name(layers: Sequence[str]) -> str:
    """What a group of layers is called: what their names begin with, and the rest of each."""
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ".".join((*parts[0][:shared], "+".join(".".join(part[shared:]) for part in parts)))


def _sharing(tensor: TensorPlan, name: str) -> TensorPlan:
    """A plan in a group; the reason tells of it without the number of the block, so that blocks are shown as one."""
    return replace(tensor, shares=name, why=f"{tensor.why}; {name.rpartition('.')[2]} share proj_down")


def _can_share(tensor: TensorPlan) -> bool:
    if tensor.action != "quantize" or tensor.weight.axes != MATRIX_AXES:
        return False
    fmt = tensor.fmt
    return isinstance(fmt, SvdquantW4A4) and fmt.plain == fmt and tensor.pipeline.start in STARTS


def _kind(tensor: TensorPlan) -> tuple[object, ...]:
    """What layers that share must have in common."""
    pipeline = tensor.pipeline
    return tensor.stored.spec, tensor.weight.matrix[1], tensor.dtype, pipeline.start, pipeline.steps


def _input(name: str, layer: str, statistics: LayerStatistics | None) -> tuple[str, str] | None:
    """What tells the input of a layer from others, or None where nothing is known of it."""
    inputs: object = statistics
    if isinstance(inputs, KnowsInputs) and knowledge(statistics, name):
        read = inputs.input_of(name)
        return None if read is None else (_block(layer), f"statistics: {read}")
    return _input_by_name(layer)


def _input_by_name(layer: str) -> tuple[str, str] | None:
    parent, _, last = layer.rpartition(".")
    if last in _SHORT:
        return parent, _SHORT[last]
    found = _QKV.match(last)
    if found is None:
        return None
    other = found["role"] in _QUERY and _CROSS.search(layer)
    return parent, f"{found['head']}{'q' if other else '*'}{found['tail']}"


def _block(layer: str) -> str:
    """The block of a model that a layer stands in; without one, its parent."""
    found = list(_BLOCK.finditer(layer))
    if found:
        return layer[: found[-1].end()]
    numbered = _NUMBERED.match(layer)
    return numbered.group() if numbered else layer.rpartition(".")[0]
