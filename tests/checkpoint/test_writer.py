"""A file is written in any order, is visible only when complete, and is the same after any interruption."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint import journal, positioned_io
from lowbit.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import CheckpointError, WriteError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.scale": torch.tensor(0.5),
    "b.weight": torch.arange(10, dtype=torch.uint8),
    "b.scale": torch.ones(0, 4, dtype=torch.float8_e4m3fn),
}
ENTRIES = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
METADATA = {"format": "pt"}


def begin(target, *, fingerprint="f1", entries=ENTRIES, resume=True) -> CheckpointWriter:
    """A writer of TENSORS."""
    return CheckpointWriter(target, entries, METADATA, fingerprint=fingerprint, resume=resume)


def write_unit(writer: CheckpointWriter, unit: str) -> None:
    """Write and commit the tensors whose names begin with the unit's."""
    names = [name for name in TENSORS if name.startswith(unit)]
    for name in names:
        writer.write(name, TENSORS[name])
    writer.commit(unit, {"tensors": names, "sqnr": 31.5})


@pytest.fixture
def complete(tmp_path) -> bytes:
    """The bytes of the file when no run was interrupted."""
    folder = tmp_path / "complete"
    folder.mkdir()
    writer = begin(folder / "out.safetensors")
    write_unit(writer, "a")
    write_unit(writer, "b")
    return writer.finish().read_bytes()


def leftovers(folder) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_the_safetensors_library_loads_what_was_written(tmp_path):
    """All dtypes, written from the last to the first and partly by threads, load in the library bit for bit."""
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.ones(0, 3), "strided": torch.arange(12.0).reshape(3, 4).T}
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(tmp_path / "a.safetensors", entries, {"k": "v"}, fingerprint="f")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: writer.write(name, tensors[name]), reversed(tensors)))
    for name, tensor in tensors.items():
        back = writer.read_back(name)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert bytes(positioned_io.byte_view(back)) == bytes(positioned_io.byte_view(tensor.contiguous()))

    path = writer.finish()

    assert path == tmp_path / "a.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bytes(positioned_io.byte_view(loaded[name])) == bytes(positioned_io.byte_view(tensor.contiguous()))
    with SafetensorsFile(path) as file:
        assert file.metadata == {"k": "v"}
    assert leftovers(tmp_path) == ["a.safetensors"]


def test_storing_begins_with_each_tensor(tmp_path, complete, monkeypatch):
    """Of exactly what was written; where the system cannot be asked, the file is the same."""
    asked = []

    def ask(fd, offset, size, flags):
        assert flags == positioned_io._STORE
        asked.append(os.pread(fd, size, offset))

    for request in (ask, None):
        monkeypatch.setattr(positioned_io, "_storing", lambda request=request: request)
        writer = begin(tmp_path / "out.safetensors")
        write_unit(writer, "a")
        write_unit(writer, "b")
        assert writer.finish().read_bytes() == complete
    assert asked == [bytes(positioned_io.byte_view(one)) for one in TENSORS.values() if one.numel()]


def test_the_order_of_writing_does_not_change_the_file(tmp_path, complete):
    """Units and tensors written in another order give the same bytes."""
    writer = begin(tmp_path / "out.safetensors")
    write_unit(writer, "b")
    write_unit(writer, "a")

    assert writer.finish().read_bytes() == complete


@pytest.mark.parametrize("old", [None, b"old content"])
def test_the_target_is_untouched_until_the_end(tmp_path, old):
    """Before finish, and after an abort, a target that existed has its old content and one that did not is absent."""
    target = tmp_path / "out.safetensors"
    if old:
        target.write_bytes(old)
    for keep in (True, False):
        writer = begin(target)
        write_unit(writer, "a")
        writer.abort(keep=keep)
        writer.abort(keep=keep)  # the second does nothing

        assert (target.read_bytes() if target.exists() else None) == old
        assert (tmp_path / "out.safetensors.partial").exists() == keep
        assert (tmp_path / "out.safetensors.partial.journal").exists() == keep


def test_a_link_as_target_is_replaced_not_followed(tmp_path, complete):
    """Where the target is a link, the link becomes the file, and what it pointed to stays as it was."""
    (tmp_path / "precious").write_bytes(b"precious")
    target = tmp_path / "out.safetensors"
    target.symlink_to("precious")
    writer = begin(target)
    write_unit(writer, "a")
    write_unit(writer, "b")
    writer.finish()

    assert target.read_bytes() == complete
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_mode_of_the_file_follows_the_umask(tmp_path, mask):
    """A new file has the permissions that the user's umask asks for."""
    previous = os.umask(mask)
    try:
        writer = begin(tmp_path / "out.safetensors")
        write_unit(writer, "a")
        write_unit(writer, "b")
        mode = stat.S_IMODE(writer.finish().stat().st_mode)
    finally:
        os.umask(previous)
    assert mode == 0o666 & ~mask


KILLED = """
import os, signal, sys, torch
from lowbit.checkpoint.writer import CheckpointWriter
entries = [(f"{unit}.{kind}", torch.float32, (1000,)) for unit in "abcde" for kind in ("weight", "scale")]
writer = CheckpointWriter(sys.argv[1], entries, {}, fingerprint="f")
print(",".join(writer.done), flush=True)
for number, unit in enumerate("abcde"):
    if unit in writer.done:
        continue
    writer.write(f"{unit}.weight", torch.full((1000,), float(number)))
    if unit == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.write(f"{unit}.scale", torch.full((1000,), -float(number)))
    writer.commit(unit, {"tensors": [f"{unit}.weight", f"{unit}.scale"], "number": number})
writer.finish()
"""


def test_a_run_killed_twice_ends_with_the_same_bytes(tmp_path):
    """After kill -9 in the middle of a unit, a resumed run redoes that unit only, and the file has the same bytes."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out.safetensors")]
    runs = [subprocess.run([*command, kill], capture_output=True, text=True, check=False) for kill in "cd-"]
    subprocess.run([*command[:-1], str(tmp_path / "whole.safetensors"), "-"], check=True, capture_output=True)

    assert [run.returncode for run in runs] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert [run.stdout.strip() for run in runs] == ["", "a,b", "a,b,c"]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert leftovers(tmp_path) == ["out.safetensors", "whole.safetensors"]


def test_a_resumed_run_finds_the_records(tmp_path, complete, caplog):
    """What commit was given comes back in done, the tensors can be read back, and the rest completes the file."""
    target = tmp_path / "out.safetensors"
    writer = begin(target)
    write_unit(writer, "b")
    writer.abort(keep=True)

    with caplog.at_level(logging.INFO, "lowbit"):
        resumed = begin(target)

    assert resumed.done == {"b": {"tensors": ["b.weight", "b.scale"], "sqnr": 31.5}}
    assert "out.safetensors: resuming, 1 units are done" in caplog.text
    assert torch.equal(resumed.read_back("b.weight"), TENSORS["b.weight"])
    write_unit(resumed, "a")
    assert resumed.finish().read_bytes() == complete


def edit_journal(edit):
    """A change to the journal's text, as one of the ways to spoil an interrupted run."""

    def apply(folder):
        path = folder / "out.safetensors.partial.journal"
        path.write_bytes(edit(path.read_bytes()))

    return apply


def edit_partial(edit):
    """A change to the unfinished file."""

    def apply(folder):
        path = folder / "out.safetensors.partial"
        path.write_bytes(edit(path.read_bytes()))

    return apply


@pytest.mark.parametrize("tail", [b'{"unit": "b", "rec', b"\0\0\0\0\n", b'{"unit":"b"'])
def test_a_torn_last_line_of_the_journal_is_ignored(tmp_path, complete, tail):
    """A line that a dying run wrote in part costs its own unit and no other, also when the run is killed once more."""
    target = tmp_path / "out.safetensors"
    writer = begin(target)
    write_unit(writer, "a")
    writer.abort(keep=True)
    edit_journal(lambda text: text + tail)(tmp_path)

    for _ in range(2):
        resumed = begin(target)
        assert list(resumed.done) == ["a"]
        resumed.abort(keep=True)
    resumed = begin(target)
    write_unit(resumed, "b")

    assert resumed.finish().read_bytes() == complete


@pytest.mark.parametrize(
    ("spoil", "arguments", "reason"),
    [
        (None, {"fingerprint": "f2"}, "another input or with other options"),
        (None, {"entries": [*ENTRIES, ("c", torch.int8, (1,))]}, "other tensors"),
        (edit_journal(lambda _: b""), {}, "journal is damaged"),
        (edit_journal(lambda _: b"\xff\n"), {}, "journal is damaged"),
        (edit_journal(lambda text: text.replace(b'"lowbit_journal":1', b'"lowbit_journal":2')), {}, "another version"),
        (edit_journal(lambda text: text.replace(b'["a.weight"', b'["z.weight"')), {}, "journal is damaged"),
        (edit_journal(lambda text: text.replace(b'"tensors":', b'"tensor":')), {}, "journal is damaged"),
        (edit_partial(lambda data: data[:-1]), {}, "length and header"),
        (edit_partial(lambda data: data[:8] + b"x" + data[9:]), {}, "length and header"),
        (lambda folder: (folder / "out.safetensors.partial.journal").unlink(), {}, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_work_is_not_resumed(tmp_path, caplog, spoil, arguments, reason):
    """An unfinished file of other work, or a damaged one, is written afresh, and the log says why."""
    writer = begin(tmp_path / "out.safetensors")
    write_unit(writer, "a")
    writer.abort(keep=True)
    if spoil:
        spoil(tmp_path)

    with caplog.at_level(logging.WARNING, "lowbit"):
        fresh = begin(tmp_path / "out.safetensors", **arguments)

    assert fresh.done == {}
    assert f"{tmp_path / 'out.safetensors'}: starting afresh" in caplog.text
    assert reason in caplog.text
    with pytest.raises(CheckpointError, match="not written yet"):
        fresh.read_back("a.weight")
    fresh.abort(keep=False)
    assert leftovers(tmp_path) == []


def test_resume_false_starts_afresh(tmp_path):
    """With resume=False the unfinished file is discarded, its data too."""
    writer = begin(tmp_path / "out.safetensors")
    write_unit(writer, "a")
    writer.abort(keep=True)

    fresh = begin(tmp_path / "out.safetensors", resume=False)

    assert fresh.done == {}
    assert not any((tmp_path / "out.safetensors.partial").read_bytes()[len(fresh._header) :])
    fresh.abort(keep=False)


@pytest.mark.parametrize("boots", [("one", "two"), (None, None)])
def test_after_a_restart_only_what_was_forced_to_disk_counts(tmp_path, monkeypatch, boots):
    """Units committed after the last forced write may have been lost with the machine's power, and are done again."""
    target = tmp_path / "out.safetensors"
    monkeypatch.setattr(journal, "boot_id", lambda: boots[0])
    writer = begin(target)
    monkeypatch.setattr(journal, "_SYNC_EVERY", 0.0)
    write_unit(writer, "a")
    monkeypatch.setattr(journal, "_SYNC_EVERY", 1e9)
    write_unit(writer, "b")
    os.close(writer._fd)  # as a machine that stops: no abort
    writer._journal.close()

    monkeypatch.setattr(journal, "boot_id", lambda: boots[1])
    resumed = begin(target)
    assert list(resumed.done) == ["a"]
    resumed.abort(keep=True)
    monkeypatch.setattr(journal, "boot_id", lambda: "three")
    again = begin(target)
    assert list(again.done) == ["a"]
    again.abort(keep=False)


def test_the_journal_begins_with_what_it_is_about(tmp_path):
    """The first line names the version, the fingerprint, the header's digest and the size; then a line a unit."""
    writer = begin(tmp_path / "out.safetensors")
    write_unit(writer, "a")
    first, unit = map(json.loads, (tmp_path / "out.safetensors.partial.journal").read_text().splitlines())
    writer.abort(keep=False)

    assert (first["lowbit_journal"], first["fingerprint"], len(first["header_sha256"])) == (1, "f1", 64)
    assert first["size"] == writer._size
    assert unit == {"unit": "a", "record": {"tensors": ["a.weight", "a.scale"], "sqnr": 31.5}}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda writer: writer.write("c", torch.ones(1)), "'c' is not among those announced"),
        (lambda writer: writer.write("a.scale", torch.tensor(1.0).half()), "'a.scale' should be torch.float32"),
        (lambda writer: writer.write("a.weight", torch.ones(3, 2)), r"'a.weight' should be .* of shape \[2, 3\], not"),
        (lambda writer: writer.read_back("a.weight"), "'a.weight' was not written yet"),
        (lambda writer: writer.read_back("c"), "'c' is not among those announced"),
        (lambda writer: writer.commit("a", {"tensors": ["a.weight"]}), "unit 'a' is not complete: 'a.weight' was not"),
        (lambda writer: writer.commit("a", {}), "unit 'a' must list its tensors"),
        (lambda writer: writer.finish(), "not complete: 'a.weight', 'a.scale', 'b.weight' and 1 more tensors were not"),
    ],
)
def test_wrong_use_is_refused(tmp_path, action, message):
    """A tensor that was not announced or does not fit, and what is not complete, is one error; the work can go on."""
    writer = begin(tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match=rf"out\.safetensors: .*{message}"):
        action(writer)
    write_unit(writer, "a")
    write_unit(writer, "b")
    writer.finish()
    for late in (lambda: writer.write("a.weight", TENSORS["a.weight"]), writer.finish, lambda: writer.commit("a", {})):
        with pytest.raises(CheckpointError, match="finished or aborted"):
            late()


def test_an_impossible_header_names_the_target(tmp_path):
    """Two layers with one name are refused before any file is made."""
    with pytest.raises(CheckpointError, match=r"out\.safetensors: two layers with one name: 'a.scale'"):
        begin(tmp_path / "out.safetensors", entries=[*ENTRIES, ENTRIES[1]])
    assert leftovers(tmp_path) == []


def test_a_second_writer_of_one_target_is_refused(tmp_path):
    """While a writer is at work, another one, in this process or in another, is refused and disturbs nothing."""
    target = tmp_path / "out.safetensors"
    writer = begin(target)
    write_unit(writer, "a")

    with pytest.raises(WriteError, match=r"out\.safetensors: another process is writing this file"):
        begin(target)
    other = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), "-"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "another process is writing this file" in other.stderr

    write_unit(writer, "b")
    assert writer.finish() == target
    begin(target).abort(keep=False)  # and afterwards the next one may


def test_a_partial_file_renamed_before_it_was_locked_is_let_go(tmp_path, monkeypatch):
    """A writer that opens the partial file of one that just finishes must not then empty the finished file."""
    target = tmp_path / "out.safetensors"
    first = begin(target)
    write_unit(first, "a")
    write_unit(first, "b")
    real = positioned_io.try_lock

    def finish_meanwhile(fd):
        if not target.exists():
            first.finish()
        return real(fd)

    monkeypatch.setattr("lowbit.checkpoint.writer.try_lock", finish_meanwhile)
    second = begin(target)

    assert torch.equal(load_file(target)["a.weight"], TENSORS["a.weight"])
    assert not os.path.samestat(os.fstat(second._fd), target.stat())
    second.abort(keep=False)
