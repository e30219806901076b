"""Files of Black Forest Labs in fp8 and nvfp4: codes and scales without a word on how they are stored. Read only.

    weight                 weight_scale              weight_scale_2   format
    float8_e4m3fn [N, K]   float32 [N] or []                          fp8_e4m3
    uint8 [N, K / 2]       float8_e4m3fn [N, K/16]   float32 []       nvfp4

Scales lie in rows. `bfl` has the even column in the low nibble, `bfl_swapped` (the official FLUX.2 export with packed
query, key and value) in the high one. ComfyUI's files have the same names and shapes and another order of scales, so
neither is ever detected: whoever knows where a file comes from says so (`--source-dialect`).
"""

from __future__ import annotations

from lowbit.checkpoint.dialects.base import Container, FoundLayers, Read, StoredLayer, register_dialect
from lowbit.checkpoint.dialects.described import LayerTensors, collect, logical_dtype, tensors_by_layer
from lowbit.checkpoint.dialects.modelopt import ROLES, format_of, load_linear_parts, stored_layer
from lowbit.checkpoint.dialects.read_only import ReadOnly
from lowbit.formats import Parts
from lowbit.numerics.packing import swap_nibbles


class Bfl(ReadOnly):
    """Reads one of the two orders of nibbles; see `Dialect` for the contracts."""

    def __init__(self, name: str, summary: str, *, swapped: bool) -> None:
        self.name, self.summary = name, summary
        self._swapped = swapped

    def detect(self, held: Container) -> bool:
        """Never: nothing in a file tells it from two others."""
        return False

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        dtype = logical_dtype(held)

        def make(tensors: LayerTensors) -> StoredLayer | None:
            return stored_layer(tensors, format_of(tensors), dtype, read) if "weight_scale" in tensors.keys else None

        return collect(held, tensors_by_layer(held, ROLES).values(), make, strict=strict)

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        parts = load_linear_parts(layer, read)
        if self._swapped and layer.format.name == "nvfp4":
            parts["qdata"] = swap_nibbles(parts["qdata"])
        return parts


BFL = register_dialect(Bfl("bfl", "Black Forest Labs fp8 and nvfp4 files; never detected", swapped=False))
BFL_SWAPPED = register_dialect(
    Bfl("bfl_swapped", "the same files with the even column in the high nibble; never detected", swapped=True)
)
