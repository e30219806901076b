"""Reading one safetensors file: its header is checked in full before a byte of data is trusted."""

from __future__ import annotations

from lowbit.errors import CheckpointError

from .safetensors_header import DTYPES, MAX_HEADER, TensorInfo, encode_header, parse_header
from .weight_file import WeightFile

__all__ = ["DTYPES", "SafetensorsFile", "TensorInfo", "encode_header"]

_MAGICS = {
    b"PK\x03\x04": "a zip archive, such as a pickle checkpoint of torch.save,",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version ": "a Git LFS pointer, which stands for the file (run git lfs pull),",
}


class SafetensorsFile(WeightFile):
    """One open safetensors file; `metadata` is the header's `__metadata__`. See `WeightFile`."""

    def _parse_header(self) -> bytes:
        header = self._read_header()
        self.metadata, self.tensors = parse_header(header, self.path, self.size)
        return header

    def _read_header(self) -> bytes:
        if self.size < 8:
            what = "is empty" if self.size == 0 else f"has only {self.size} bytes"
            raise CheckpointError(f"{self.path}: {what}, so it is no safetensors file; download or write it again")
        length = int.from_bytes(self._read_range(0, 8), "little")
        if length > self.size - 8:
            self._refuse_other_kinds()
            raise CheckpointError(
                f"{self.path}: the header should have {length} bytes, but only {self.size - 8} follow; "
                "the file is truncated or is no safetensors file (lowbit reads only safetensors); download it again"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{self.path}: the header has {length} bytes; safetensors allows {MAX_HEADER}. "
                "Write the file again with less metadata or fewer tensors"
            )
        return self._read_range(8, 8 + length)

    def _refuse_other_kinds(self) -> None:
        """Name the kind of a file that begins as another one does, whatever its name; none of them is opened."""
        start = self._read_range(0, 8)
        if start.startswith(b"GGUF"):
            raise CheckpointError(f"{self.path}: is a GGUF file and no safetensors file; give it a name in .gguf")
        for magic, kind in _MAGICS.items():
            if start.startswith(magic):
                raise CheckpointError(
                    f"{self.path}: is {kind} and no safetensors file, which lowbit needs here; "
                    "take the model's safetensors files"
                )
