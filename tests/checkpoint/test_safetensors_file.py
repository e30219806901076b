"""A sound safetensors file is read bit for bit, by many threads, and every kind of unsound one is refused by name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import positioned_io, safetensors_header
from lowbit.checkpoint.safetensors_file import DTYPES, SafetensorsFile, encode_header
from lowbit.errors import CheckpointError


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, NaN payloads and signs of zero included."""
    return bytes(positioned_io.byte_view(tensor.contiguous()))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern of a dtype; for bool, the two that are allowed."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw_file(path, header: object, data: bytes = b"", length: int | None = None):
    """Write a file with a header (an object to encode, or raw bytes) that may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    """A header entry, sound unless told otherwise."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_reads_what_the_safetensors_library_writes(tmp_path, dtype):
    """For every dtype, tensors of 0 to 3 dimensions, empty ones too, are read with the same bits, shape and dtype."""
    shapes = {"scalar": (), "row": (7,), "matrix": (5, 3), "cube": (2, 3, 4), "no rows": (0, 4), "ünï": (1, 1)}
    written = {name: random_tensor(dtype, shape) for name, shape in shapes.items()}
    save_file(written, tmp_path / "a.safetensors", {"format": "pt"})

    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        read = {name: file.read(name) for name in file.tensors}
        raw = {name: file.read_bytes(name) for name in file.tensors}

    assert file.metadata == {"format": "pt"}
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert (read[name].dtype, read[name].shape) == (dtype, tensor.shape)
        assert bits(read[name]) == bits(tensor) == raw[name]


def test_the_safetensors_library_reads_our_header(tmp_path):
    """A file laid out by encode_header, all dtypes mixed, is loaded by the library bit for bit and aligned."""
    shapes = [(), (3,), (5, 3), (0, 4)]
    written = {f"{name}/{shape}": random_tensor(dtype, shape) for name, dtype in DTYPES.items() for shape in shapes}
    header, spans = encode_header([(n, t.dtype, tuple(t.shape)) for n, t in written.items()], {"b": "2", "a": "ü"})
    data = bytearray(max(stop for _, stop in spans.values()))
    data[: len(header)] = header
    for name, (start, stop) in spans.items():
        data[start:stop] = bits(written[name])
        assert start % written[name].dtype.itemsize == 0
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)

    loaded = load_file(path)

    assert len(header) % 8 == 0
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {n: bits(t) for n, t in written.items()}
    assert {name: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in written.items()}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "ü", "b": "2"}
    with SafetensorsFile(path) as ours:
        assert {name: (info.start, info.stop) for name, info in ours.tensors.items()} == spans


def test_encode_header_is_deterministic():
    """The order of metadata does not matter, and the order of entries of one width is kept."""
    entries = [("b", torch.float32, (2,)), ("a", torch.float32, (2,)), ("c", torch.float64, (1,))]

    first, spans = encode_header(entries, {"x": "1", "y": "2"})
    second, _ = encode_header(entries, {"y": "2", "x": "1"})

    assert first == second
    assert sorted(spans, key=spans.__getitem__) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("entries", "metadata", "message"),
    [
        ([("a", torch.float32, (1,)), ("a", torch.float32, (2,))], {}, "two layers with one name: 'a'"),
        ([("__metadata__", torch.float32, (1,))], {}, "'__metadata__'"),
        ([("a", torch.quint8, (1,))], {}, "'a' has torch.quint8"),
        ([("a", torch.float32, (1,))], {"n": 3}, "metadata value must be text"),
        ([("\ud800", torch.float32, (1,))], {}, "UTF-8"),
    ],
)
def test_encode_header_refuses_what_cannot_be_stored(entries, metadata, message):
    """A name twice, the reserved name, a foreign dtype, metadata or a name that is no text: one error each."""
    with pytest.raises(CheckpointError, match=message):
        encode_header(entries, metadata)


def test_a_read_tensor_is_fresh_and_writable(tmp_path):
    """Changing what was read changes neither the file nor what is read next."""
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")

    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        file.read("a").zero_()

        assert file.read("a").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 4), (4, 5), (2, 2), (5, 5)])
def test_rows_are_the_rows_of_the_whole(tmp_path, start, stop):
    """read_rows equals slicing the whole tensor, no rows included."""
    written = torch.randn(5, 3, 2, dtype=torch.bfloat16)
    save_file({"other": torch.ones(3), "a": written}, tmp_path / "a.safetensors")

    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read_rows("a", start, stop), written[start:stop])


@pytest.mark.parametrize(("name", "start", "stop"), [("a", 0, 6), ("a", -1, 2), ("a", 3, 2), ("scalar", 0, 1)])
def test_rows_that_are_not_there_are_refused(tmp_path, name, start, stop):
    """Rows beyond the tensor, reversed ones and rows of a scalar are an error that names file and tensor."""
    save_file({"a": torch.ones(5, 3), "scalar": torch.tensor(1.0)}, tmp_path / "a.safetensors")

    with SafetensorsFile(tmp_path / "a.safetensors") as file, pytest.raises(CheckpointError, match=f"a.safe.*{name!r}"):
        file.read_rows(name, start, stop)


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_read_at_the_same_time(tmp_path, monkeypatch, positioned):
    """Sixteen threads on one open file get their own tensors, also on a system without positioned reads."""
    monkeypatch.setattr(positioned_io, "_HAS_POSITIONED", positioned)
    monkeypatch.setattr(positioned_io, "_CALL_LIMIT", 1000)  # many short calls for each tensor
    written = {f"t{number}": torch.full((999,), float(number)) for number in range(64)}
    save_file(written, tmp_path / "a.safetensors")

    with SafetensorsFile(tmp_path / "a.safetensors") as file, ThreadPoolExecutor(16) as pool:
        read = dict(zip(written, pool.map(file.read, written), strict=True))

    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """A system that returns less than was asked for still gives the whole tensor."""
    written = torch.randn(1000)
    save_file({"a": written}, tmp_path / "a.safetensors")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:100]], offset))

    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("a"), written)


def test_a_file_cut_while_open_is_an_error(tmp_path):
    """A file that became shorter after it was opened gives an error, not a tensor with made-up values."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)

    with SafetensorsFile(path) as file:
        os.truncate(path, file.size - 10)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'a' ends 10 bytes early"):
            file.read("a")


def test_an_error_of_the_disk_is_reported(tmp_path, monkeypatch):
    """An input/output error while reading names the file and the tensor."""
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot read tensor 'a': Input/output error"):
            file.read("a")


@pytest.mark.parametrize("dtype_name", ["F4", "F6_E2M3", "Q4_K"])
def test_a_dtype_that_torch_lacks_is_listed_but_not_read(tmp_path, dtype_name):
    """Such a file opens, lists the tensor, gives its bytes and its other tensors; only the tensor itself is refused."""
    header = {"odd": entry(dtype_name, (4, 4), (0, 12 if dtype_name == "F6_E2M3" else 8))}
    odd = header["odd"]["data_offsets"][1]
    header["fine"] = entry("F32", (1,), (odd, odd + 4))
    path = raw_file(tmp_path / "a.safetensors", header, bytes(range(odd)) + torch.ones(1).numpy().tobytes())

    with SafetensorsFile(path) as file:
        assert (file.tensors["odd"].dtype_name, file.tensors["odd"].numel) == (dtype_name, 16)
        assert file.read_bytes("odd") == bytes(range(odd))
        assert file.read("fine").item() == 1
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: tensor 'odd' has dtype '{dtype_name}'"):
            file.read("odd")


def test_a_missing_tensor_is_named(tmp_path):
    """Asking for a tensor that is not there names the file and the tensor."""
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with (
        SafetensorsFile(tmp_path / "a.safetensors") as file,
        pytest.raises(CheckpointError, match=r"a\.safe.*no tensor 'b'"),
    ):
        file.read("b")


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A missing path, a folder, a pipe (which must not block) and a name with a NUL are refused by name."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in [("none", "does not exist"), (".", "is a folder"), ("pipe", "is a pipe"), ("a\0b", "opened")]:
        with pytest.raises(CheckpointError, match=message) as error:
            SafetensorsFile(tmp_path / name)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x02\x00", "only 2 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "header should have 100 bytes, but only 2 follow"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "no safetensors file"),
    ],
    ids=["empty", "shorter than 8 bytes", "header longer than the file", "zip"],
)
def test_a_file_that_is_no_container_is_refused(tmp_path, content, message):
    """A file too short for its header names the file and what is wrong."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        SafetensorsFile(path)


def test_a_giant_header_is_refused(tmp_path, monkeypatch):
    """A header over the format's 100 MB is refused before it is read, on reading and on writing."""
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # a hole: takes no space
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: the header has 100000001 bytes"):
        SafetensorsFile(path)
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", 50)
    with pytest.raises(CheckpointError, match="write shards"):
        encode_header([("a" * 60, torch.float32, (1,))], {})


TWICE = b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"{not json", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not UTF-8"),
        (b"[1, 2]", 0, "list, not an object"),
        (b"[" * 100_000, 0, "cannot be read"),
        (b'{"\\ud800": {}}', 0, "not UTF-8"),
        (TWICE, 8, "'a' twice: two layers with one name"),
        ({"__metadata__": {"n": 3}, "a": entry()}, 8, "__metadata__"),
        ({"__metadata__": [], "a": entry()}, 8, "__metadata__"),
        ({"a": 3}, 8, "'a' must have exactly"),
        ({"a": {"dtype": "F32"}}, 8, "'a' must have exactly"),
        ({"a": entry(dtype=3)}, 8, "'a' has the dtype 3"),
        ({"a": entry(shape=(-2,))}, 8, "'a' has the shape"),
        ({"a": entry(shape=(2.0,))}, 8, "'a' has the shape"),
        ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, "'a' has the shape"),
        ({"a": entry(offsets=(-8, 0))}, 8, "'a' has data_offsets"),
        ({"a": entry(offsets=(0, True))}, 8, "'a' has data_offsets"),
        ({"a": entry(offsets=(0, 4, 8))}, 8, "'a' has data_offsets"),
        ({"a": entry(offsets=(8, 0))}, 8, "'a' ends at byte 0 before it starts at 8"),
        ({"a": entry(shape=(3,))}, 8, "'a' holds 8 bytes, but dtype F32 and shape .3. need 12"),
        ({"a": entry("F4", (3,), (0, 2))}, 2, "'a' holds 2 bytes, but dtype F4 and shape .3. need 1.5"),
        ({"a": entry()}, 7, "truncated: 1 of .* bytes are missing, from tensor 'a' on"),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, 0, "truncated: 16 of .* from tensor 'a' on"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'a' and 'b' overlap by 4 bytes"),
        ({"a": entry(), "b": entry()}, 8, "'a' and 'b' overlap by 8 bytes"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "4 bytes between tensors 'a' and 'b'"),
        ({"a": entry(offsets=(4, 12))}, 12, "4 bytes before tensor 'a'"),
        ({"a": entry()}, 11, "3 bytes after the last tensor"),
        ({}, 3, "3 bytes after the last tensor"),
    ],
)
def test_an_unsound_header_is_refused(tmp_path, header, size, message):
    """Each way in which a header can be wrong gives one error that names the file, the tensor and the fault."""
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(size))

    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}") as error:
        SafetensorsFile(path)
    assert any(
        remedy in str(error.value)
        for remedy in ("ownload it again", "ownload or write it again", "rite the file again")
    )


def test_an_empty_file_of_tensors_is_sound(tmp_path):
    """A header without tensors is legal, as it is for the safetensors library."""
    path = raw_file(tmp_path / "a.safetensors", {})
    assert load_file(path) == {}
    with SafetensorsFile(path) as file:
        assert file.tensors == {}


def test_the_header_may_name_tensors_in_any_order(tmp_path):
    """Names come in the order of the data, with an empty tensor between two others, whatever the header's order."""
    header = {"c": entry(offsets=(8, 16)), "b": entry(shape=(0,), offsets=(8, 8)), "a": entry()}
    path = raw_file(tmp_path / "a.safetensors", header, torch.arange(4.0).numpy().tobytes())
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == ["a", "b", "c"]
        assert file.read("c").tolist() == [2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_keeps_one_tensor_in_memory(tmp_path):
    """Reading 8 tensors of 32 MB one after the other never holds more than about one of them."""
    save_file({f"t{number}": torch.zeros(8 << 20) for number in range(8)}, tmp_path / "a.safetensors")
    program = (
        "import resource, sys\n"
        "from lowbit.checkpoint.safetensors_file import SafetensorsFile\n"
        "with SafetensorsFile(sys.argv[1]) as file:\n"
        "    file.read_rows('t0', 0, 1)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    total = sum(file.read(name).numel() for name in file.tensors)\n"
        "    print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    total, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert total == 64 << 20
    assert grown < 80 << 10  # kB: two tensors and some, far from the 256 MB of the file
