"""When the disk refuses, the writer says so once, in words, before work starts where that is possible."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import CheckpointError, WriteError

ENTRIES = [("a", torch.float32, (1000,)), ("b", torch.float32, (1000,))]


def begin(target, entries=ENTRIES) -> CheckpointWriter:
    """A writer of two tensors of 4000 bytes."""
    return CheckpointWriter(target, entries, {}, fingerprint="f")


def failing(number: int):
    """A system call that always fails with the errno."""

    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder on a file system of one megabyte, where the system lets us make one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_noticed_before_work_starts(tiny_disk):
    """A file larger than a real disk's free space is refused at once, with sizes; the target is untouched."""
    target = tiny_disk / "out.safetensors"
    target.write_bytes(b"old")

    with pytest.raises(WriteError, match=r"out\.safetensors: no space left: .* needs 4\.0 MB in all, 1\.0 MB are free"):
        begin(target, [("a", torch.float32, (1_000_000,))])

    assert [path.name for path in tiny_disk.iterdir()] == ["out.safetensors"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left: cannot begin to write"),
        (errno.EDQUOT, "no space left: cannot begin to write"),
        (errno.EFBIG, "more than this file system or the process's limit"),
        (errno.EIO, "cannot begin to write: Input/output error"),
    ],
)
def test_a_refused_reservation_leaves_nothing(tmp_path, monkeypatch, number, message):
    """When the space cannot be had, the error says which file and why, and no half-made file stays."""
    monkeypatch.setattr(os, "posix_fallocate", failing(number))

    with pytest.raises(WriteError, match=rf"out\.safetensors: .*{message}"):
        begin(tmp_path / "out.safetensors")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_disk_that_cannot_reserve_still_works(tmp_path, monkeypatch, number):
    """Where blocks cannot be allocated ahead, the file is written all the same, after a look at the free space."""
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    writer = begin(tmp_path / "out.safetensors")
    writer.write("a", torch.ones(1000))
    writer.write("b", torch.zeros(1000))
    assert writer.finish().stat().st_size == writer._size

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 8500, 500))
    with pytest.raises(WriteError, match="no space left"):
        begin(tmp_path / "second.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_disk_that_fails_in_mid_run_names_the_tensor(tmp_path, monkeypatch, number):
    """An error while a tensor is written names file and tensor, and the run can be resumed when there is room again."""
    target = tmp_path / "out.safetensors"
    writer = begin(target)
    writer.write("a", torch.ones(1000))
    writer.commit("a", {"tensors": ["a"]})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(number))
        with pytest.raises(WriteError, match=r"out\.safetensors: .*cannot write tensor 'b'"):
            writer.write("b", torch.ones(1000))
    with pytest.raises(CheckpointError, match="'b' was not written"):
        writer.finish()
    writer.abort(keep=True)
    assert not target.exists()

    resumed = begin(target)
    assert list(resumed.done) == ["a"]
    resumed.abort(keep=False)


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """A commit that did not reach the journal is not taken for done."""
    writer = begin(tmp_path / "out.safetensors")
    writer.write("a", torch.ones(1000))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing(errno.ENOSPC))
        with pytest.raises(WriteError, match="no space left: cannot note unit 'a'"):
            writer.commit("a", {"tensors": ["a"]})
    writer.abort(keep=True)
    resumed = begin(tmp_path / "out.safetensors")
    assert resumed.done == {}
    resumed.abort(keep=False)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """A system that writes less than it was given still ends with the whole tensor in the file."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:100], offset))
    writer = begin(tmp_path / "out.safetensors")
    writer.write("a", torch.arange(1000.0))

    assert torch.equal(writer.read_back("a"), torch.arange(1000.0))
    writer.abort(keep=False)


def test_a_system_without_positioned_writes_works(tmp_path, monkeypatch):
    """Where only seek and write exist, the file is the same."""
    monkeypatch.setattr("lowbit.checkpoint.positioned_io._HAS_POSITIONED", False)
    writer = begin(tmp_path / "out.safetensors")
    writer.write("b", torch.arange(1000.0))
    writer.write("a", torch.ones(1000))

    assert torch.equal(writer.read_back("b"), torch.arange(1000.0))
    assert torch.equal(writer.read_back("a"), torch.ones(1000))
    writer.abort(keep=False)


def test_a_missing_folder_is_refused(tmp_path):
    """The error names the folder that should be created."""
    with pytest.raises(WriteError, match=r"none/out\.safetensors: .*none is no folder that exists; create it"):
        begin(tmp_path / "none" / "out.safetensors")


def test_a_folder_as_target_is_refused(tmp_path):
    """A target that is a folder is refused with a name that would do, before and after the work."""
    with pytest.raises(WriteError, match=r"is a folder; name a file to write, such as .*model\.safetensors"):
        begin(tmp_path)
    writer = begin(tmp_path / "out.safetensors", [])
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(WriteError, match="is a folder"):
        writer.finish()
    writer.abort(keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    """A folder in which nothing can be created is named, with the system's reason."""
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(WriteError, match=r"out\.safetensors: cannot create .*: Permission denied; check the folder"):
        begin(tmp_path / "out.safetensors")


def test_a_folder_without_write_permission_is_refused(tmp_path):
    """The same with a real folder and its real permissions."""
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(WriteError, match=r"cannot create .*: Permission denied"):
        begin(tmp_path / "out.safetensors")
    tmp_path.chmod(0o700)


def test_a_link_in_place_of_the_partial_file_is_refused(tmp_path):
    """A partial file that is a link is not followed: it could lead to the input."""
    (tmp_path / "input").write_bytes(b"precious")
    (tmp_path / "out.safetensors.partial").symlink_to("input")
    with pytest.raises(WriteError, match=r"out\.safetensors: cannot create .*link, remove it"):
        begin(tmp_path / "out.safetensors")
    assert (tmp_path / "input").read_bytes() == b"precious"


def test_a_file_size_limit_is_one_error(tmp_path):
    """Under `ulimit -f` the reservation is refused in words, and the process is not killed by the system's signal."""
    program = (
        "import resource, sys, torch\n"
        "from lowbit.checkpoint.writer import CheckpointWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "CheckpointWriter(sys.argv[1], [('a', torch.float32, (100000,))], {}, fingerprint='f')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out.safetensors")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "more than this file system or the process's limit (ulimit -f) allows" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """Where files cannot be locked the work goes on, and the log says what is then the user's to watch."""
    monkeypatch.setattr("lowbit.checkpoint.writer.try_lock", failing(errno.ENOLCK))
    with caplog.at_level(logging.WARNING, "lowbit"):
        begin(tmp_path / "out.safetensors").abort(keep=False)
    assert "has no locks" in caplog.text


def test_a_finished_file_survives_a_failing_rename(tmp_path, monkeypatch):
    """When the last step fails, the target is untouched and the finished work is there to resume."""
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    writer = begin(target, ENTRIES[:1])
    writer.write("a", torch.ones(1000))
    writer.commit("a", {"tensors": ["a"]})
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", failing(errno.EPERM))
        with pytest.raises(WriteError, match="cannot move the finished file into place"):
            writer.finish()
    writer.abort(keep=True)
    assert target.read_bytes() == b"old"

    resumed = begin(target, ENTRIES[:1])
    assert list(resumed.done) == ["a"]
    assert resumed.finish().stat().st_size == resumed._size
