"""A folder is put in place whole, and what was done for it is not lost: by errors at the end, or by a second run."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import CheckpointError, WriteError
from tests.support.checkpoints import files_below, save_shards


@pytest.fixture
def pipeline(tmp_path):
    """An open pipeline of one model, with a folder that has no weights."""
    root = tmp_path / "pipe"
    save_shards(root / "transformer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "P", "transformer": ["x", "y"]}))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "config.json").write_text("{}")
    with open_source(root) as source:
        yield source


def run(source, target, **options):
    """A conversion without exceptions by name."""
    return convert(source, target, make_plan(source, "fp8_e4m3", preset="none", solver="rtn"), **options)


def test_a_second_run_that_is_refused_disturbs_nothing(pipeline, tmp_path):
    """It tidies no folder away in which the first one will write at its end."""
    refused = []

    def meanwhile(*_):
        if not refused:
            with pytest.raises(WriteError, match="another process is writing this file"):
                run(pipeline, tmp_path / "out")
            refused.append(True)

    run(pipeline, tmp_path / "out", progress=meanwhile)

    assert refused
    assert (tmp_path / "out" / "scheduler" / "config.json").read_text() == "{}"
    assert not (tmp_path / "out.partial").exists()


def test_an_error_of_the_last_files_costs_no_work(pipeline, tmp_path, monkeypatch):
    """A disk that is full when the other files are copied leaves all layers to the next run."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", _fail)
        with pytest.raises(WriteError, match=r"cannot write the files beside the weights: .*No space left"):
            run(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    again = run(pipeline, tmp_path / "out")
    assert again.resumed == len(again.layers) + 2  # a batch of copies in each shard
    whole = run(pipeline, tmp_path / "whole")
    assert whole.resumed == 0
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_a_slow_disk_is_waited_for_before_any_file_is_finished(pipeline, tmp_path, monkeypatch):
    """A finished shard is not resumed, so that a run that is stopped at its end has finished none."""
    begun = []
    real = CheckpointWriter.settle

    def stopped(writer):
        begun.append(writer)
        if len(begun) == 2:
            raise KeyboardInterrupt
        real(writer)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "settle", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, tmp_path / "out")
    again = run(pipeline, tmp_path / "out")
    assert again.resumed == len(again.layers) + 2


def test_a_file_that_goes_along_is_looked_at_first(pipeline, tmp_path, monkeypatch):
    """One that may not be read is an error before any work; one file takes none along."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK and allowed(path, mode))
    with pytest.raises(CheckpointError, match=r"model_index\.json: may not be read, and goes along"):
        run(pipeline, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    run(pipeline, tmp_path / "out.safetensors")


def test_nothing_is_left_where_nothing_was_done(pipeline, tmp_path, monkeypatch):
    """A disk without room for the last shard is not left with the space taken that was had for the first."""
    real = os.posix_fallocate
    taken = []

    def reserve(fd, offset, length):
        taken.append(length)
        return _fail() if len(taken) == 2 else real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(WriteError, match="no space left: cannot begin to write"):
        run(pipeline, tmp_path / "out")
    assert len(taken) == 2
    assert not (tmp_path / "out.partial").exists()


def _fail(*_):
    raise OSError(28, os.strerror(28))
