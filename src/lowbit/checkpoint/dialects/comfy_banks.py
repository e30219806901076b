"""Banks of experts in comfy files: `num_experts` in the marker, and a leading axis E on every tensor but the marker.

A bank is described as one of its experts would be, with `num_experts` among the options; `checkpoint.banks` reads and
writes the experts one by one. `bank_transposed`: the plain weight is [E, K, N], for experts that are multiplied as
`x @ w`; the parts are those of [E, N, K] all the same. `bank_parameter`: its key has no `.weight` behind the name.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.checkpoint.dialects.base import Read, StoredLayer, TensorSpec, join_key
from lowbit.checkpoint.dialects.comfy_marker import Description, require_weight
from lowbit.errors import PartsError

EXPERTS = "num_experts"


def as_one_expert(
    description: Description, tensors: Mapping[str, TensorSpec], beside: Mapping[str, str], read: Read
) -> tuple[Mapping[str, TensorSpec], Read]:
    """A file's header and tensors as if a described bank were its first expert; unchanged for a layer that is no bank.

    Raises `PartsError` for a tensor without the leading axis.
    """
    experts = description.integer(EXPERTS)
    if experts is None:
        return tensors, read
    weight = require_weight(description, tensors)
    own = [
        key
        for suffix, key in beside.items()
        if key != description.marker and suffix != "bias" and (tensors[key].shape or suffix.startswith("weight"))
    ]
    single = dict(tensors)
    for key in own:
        spec = tensors[key]
        if not spec.shape or spec.shape[0] != experts:
            raise description.error(
                f"{key!r} is {spec}, and the marker says {experts} experts, which must be its first axis (the weight "
                f"is {weight}); the file is incomplete, get or convert it again"
            )
        single[key] = TensorSpec(spec.dtype, spec.shape[1:])
    return single, lambda key: read(key)[0] if key in own else read(key)


def check_no_bank(layer: StoredLayer) -> None:
    """Raise `PartsError` for a bank where a single matrix is wanted."""
    experts = layer.options.get(EXPERTS)
    if experts is not None:
        raise PartsError(
            f"{layer.place}: {join_key(layer.layer, 'weight')!r} is a bank of {experts} experts, which is no "
            "matrix; load it with lowbit.load, or decode the file (lowbit dequantize)"
        )
