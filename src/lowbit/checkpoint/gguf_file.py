"""Reading one GGUF file: its header is checked in full before a byte of data is trusted."""

from __future__ import annotations

import json

from .gguf_header import parse_gguf_header
from .weight_file import WeightFile

TYPES = "gguf.types"


class GgufFile(WeightFile):
    """One open GGUF file. See `WeightFile`.

    Plain tensors appear as torch has them: shapes in its order, the last size the fastest. Quantized ones appear as
    uint8 with the bytes of a row of blocks as the last size: [N, row bytes], banks of experts [E, N, row bytes].
    `metadata` has every field that is no array, as text ("true" and "false" for flags), and under "gguf.types" a JSON
    object: tensor -> name of its ggml type. `arrays`: the fields left out, with their number of elements.
    """

    arrays: dict[str, int]

    def _parse_header(self) -> bytes:
        header = parse_gguf_header(self._read_range, self.path, self.size)
        self.tensors, self.arrays = header.tensors, header.arrays
        self.metadata = {**header.fields, "gguf.version": str(header.version), TYPES: json.dumps(header.types)}
        return self._read_range(0, header.stop)
