"""Reading GGUF files: what the gguf package writes comes back, and whatever is damaged is refused by name."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError
from tests.checkpoint.gguf_files import blocks, write_file

FIELDS = {"llama.block_count": 2, "general.name": "tiny", "q.list": [1, 2, 3], "tokens": ["a", "bc"] * 50}


@pytest.fixture
def path(tmp_path):
    """A file with plain tensors and blocks of two and three axes."""
    floats = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    tensors = {
        "norm.weight": ("F32", floats[0]),
        "plain.weight": ("F16", floats.astype(np.float16)),
        "half.weight": ("BF16", torch.from_numpy(floats).bfloat16().view(torch.uint8).numpy()),
        "q.weight": ("Q4_K", blocks("Q4_K", 3, 512)),
        "bank.weight": ("Q8_0", blocks("Q8_0", 6, 64).reshape(2, 3, 68)),
    }
    return write_file(tmp_path / "m.gguf", tensors, FIELDS)


def test_tensors_come_back(path):
    """Plain tensors have torch's shapes and values, blocks are bytes with a row of them as the last size."""
    with GgufFile(path) as file:
        shapes = {name: (info.dtype_name, info.shape) for name, info in file.tensors.items()}
        assert shapes == {
            "norm.weight": ("F32", (6,)),
            "plain.weight": ("F16", (4, 6)),
            "half.weight": ("BF16", (4, 6)),
            "q.weight": ("U8", (3, 288)),
            "bank.weight": ("U8", (2, 3, 68)),
        }
        floats = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32))
        assert torch.equal(file.read("plain.weight"), floats.half())
        assert torch.equal(file.read("half.weight"), floats.bfloat16())
        assert torch.equal(file.read("q.weight"), torch.from_numpy(blocks("Q4_K", 3, 512)))
        assert torch.equal(file.read_rows("q.weight", 1, 3), file.read("q.weight")[1:])
        assert torch.equal(file.read_rows("bank.weight", 1, 2), file.read("bank.weight")[1:])
        assert file.read_bytes("q.weight") == blocks("Q4_K", 3, 512).tobytes()
        with pytest.raises(CheckpointError, match="no tensor 'other'"):
            file.read("other")


def test_fields_are_metadata(path):
    """Fields are text, short lists of numbers JSON, lists of strings are only counted; the types are one entry."""
    with GgufFile(path) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["llama.block_count"] == "2"
        assert file.metadata["q.list"] == "[1, 2, 3]"
        assert file.arrays == {"tokens": 100}
        assert json.loads(file.metadata["gguf.types"])["q.weight"] == "Q4_K"


def test_a_source_is_opened_by_its_suffix(path):
    """open_source reads *.gguf like any file, and its fingerprint follows the header."""
    with open_source(path) as source:
        assert source.kind == "file"
        assert source.read("", "norm.weight").shape == (6,)
        before = source.fingerprint()
    write_file(path, {"a.weight": ("F32", np.zeros(3, dtype=np.float32))})
    with open_source(path) as source:
        assert source.fingerprint() != before


def test_version_2_is_read(path):
    """The version before differs in nothing that is read here."""
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)

    with GgufFile(path) as file:
        assert len(file.tensors) == 5


def header(tensors: bytes, count: int, fields: bytes = b"", field_count: int = 0) -> bytes:
    """A header of version 3."""
    return b"GGUF" + struct.pack("<IQQ", 3, count, field_count) + fields + tensors


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry for a tensor; the sizes are in the file's order."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def number(name: str, value: int) -> bytes:
    """A field that is an unsigned whole number."""
    return text(name) + struct.pack("<II", 4, value)


BAD = {
    "does not begin with 'GGUF'": b"GGML" + bytes(60),
    "is of version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "is big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "is truncated: the header": b"GGUF" + struct.pack("<IQ", 3, 0),
    "is truncated: a tensor's name reaches to byte": header(struct.pack("<Q", 1000) + b"abc", 1),
    "a field's name has 99999 bytes": header(struct.pack("<Q", 99999) + bytes(64), 0, b"", 1),
    "the field 'x' has the unknown type 77": header(b"", 0, text("x") + struct.pack("<I", 77), 1),
    "holds elements of the unknown type 78": header(b"", 0, text("x") + struct.pack("<IIQ", 9, 78, 1), 1),
    "the field 'x' is in the header twice": header(b"", 0, number("x", 1) * 2, 2),
    "general.alignment is '24', expected a power of two": header(b"", 0, number("general.alignment", 24), 1),
    "is one of 3 parts of a model; join them": header(b"", 0, number("split.count", 3), 1),
    "'a' is of ggml type 4, whose size": header(tensor("a", (32,), 4), 1) + bytes(512),
    "'a' has 5 axes": header(tensor("a", (1, 1, 1, 1, 1)), 1) + bytes(512),
    "more elements than can be counted": header(tensor("a", (2**40, 2**40)), 1) + bytes(512),
    "'a' has the sizes .*, which blocks of 32": header(tensor("a", (40, 2), 2), 1) + bytes(512),
    "tensor 'a' is in the header twice": header(tensor("a", (8,)) * 2, 2) + bytes(512),
    "tensors 'a' and 'b' overlap": header(tensor("a", (16,)) + tensor("b", (8,), 0, 32), 2) + bytes(512),
    "a hole between tensors 'a' and 'b'": header(tensor("a", (8,)) + tensor("b", (8,), 0, 96), 2) + bytes(512),
    "'a' does not start where the data starts": header(tensor("a", (8,), 0, 32), 1) + bytes(512),
    "is truncated: .* bytes are missing, from tensor 'a' on": header(tensor("a", (4096,)), 1) + bytes(100),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_damaged_is_refused(tmp_path, message):
    """Every claim of the header is checked before data is read, and the error names the file."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[message])

    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}|bad\.gguf: {message}"):
        GgufFile(path)


def test_any_cut_is_noticed(path):
    """A file cut anywhere in its header or data is refused with a CheckpointError, not read in part."""
    raw = path.read_bytes()
    with GgufFile(path) as file:
        stop = max(info.stop for info in file.tensors.values())
    for length in [*range(0, 600, 7), *range(600, stop, 211)]:
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            GgufFile(path)


def test_a_noted_shape_is_taken(tmp_path):
    """Where ComfyUI-GGUF has reshaped a tensor to fit blocks, its noted shape comes back if the blocks allow it."""
    noted = {"comfy.gguf.orig_shape.a.weight": [8, 96], "comfy.gguf.orig_shape.b.weight": [8, 96]}
    tensors = {"a.weight": ("Q8_0", blocks("Q8_0", 3, 256)), "b.weight": ("Q4_K", blocks("Q4_K", 3, 256))}
    write_file(tmp_path / "m.gguf", tensors, noted)

    with GgufFile(tmp_path / "m.gguf") as file:
        assert file.tensors["a.weight"].shape == (8, 102)
        assert file.tensors["b.weight"].shape == (3, 144)
