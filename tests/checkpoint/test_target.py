"""Nothing is ever written onto, or into, what is being read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import lowbit
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.target import check_target, is_single
from lowbit.errors import WriteError


@pytest.fixture
def single(tmp_path):
    """One open file, `models/in.safetensors`."""
    path = tmp_path / "models" / "in.safetensors"
    path.parent.mkdir()
    save_file({"a": torch.ones(2)}, path)
    with open_source(path) as source:
        yield source


@pytest.fixture
def folder(tmp_path):
    """An open model folder, `llm`, with a config."""
    root = tmp_path / "llm"
    root.mkdir()
    save_file({"a": torch.ones(2)}, root / "model.safetensors")
    (root / "config.json").write_text("{}")
    with open_source(root) as source:
        yield source


@pytest.fixture
def sharded(tmp_path):
    """A set opened by its index, in `shards`."""
    root = tmp_path / "shards"
    root.mkdir()
    save_file({"a": torch.ones(2)}, root / "x.safetensors")
    index = root / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with open_source(index) as source:
        yield source


@pytest.mark.parametrize(
    "target",
    [
        "models/in.safetensors",
        "models/../models/in.safetensors",
        "link.safetensors",
        "linked/in.safetensors",
        "hard.safetensors",
        "out.safetensors",  # whose partial file would be the input
    ],
)
def test_the_input_is_no_output(single, tmp_path, target):
    """The input is recognised as the output under every spelling and through every kind of link."""
    path = single.root / "in.safetensors"
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "linked").symlink_to(single.root)
    os.link(path, tmp_path / "hard.safetensors")
    os.link(path, tmp_path / "out.safetensors.partial")
    with pytest.raises(WriteError, match=r"is the input \S+in\.safetensors itself .*choose another output"):
        check_target(single, tmp_path / target)


def test_a_new_file_beside_the_input_is_fine(single, tmp_path):
    """A new name in the input's folder or elsewhere, and an old file that is not the input, are allowed."""
    (tmp_path / "old.safetensors").write_bytes(b"old")
    for target in (single.root / "out.safetensors", tmp_path / "out.safetensors", tmp_path / "old.safetensors"):
        check_target(single, target)


def test_a_file_is_not_written_under_the_name_of_a_folder(single, folder, tmp_path):
    """A separator at the end says that a folder is meant, there or not; what becomes a folder takes such a name."""
    with pytest.raises(WriteError, match=r"new: is a folder; name a file to write, such as .*new/model\.safetensors"):
        check_target(single, f"{tmp_path}/new/")
    with pytest.raises(WriteError, match="is a folder"):
        lowbit.save(torch.nn.Linear(2, 2), f"{tmp_path}/new/")
    check_target(folder, f"{tmp_path}/new/")


def test_a_model_folder_is_not_written_into(folder, tmp_path):
    """The folder that is read, and anything in it, also through a link, is refused; a folder beside it is fine."""
    (tmp_path / "linked").symlink_to(folder.root)
    for target in (folder.root, folder.root / "out", tmp_path / "linked", tmp_path / "linked" / "out"):
        with pytest.raises(WriteError, match=r"choose (another output|an output outside of it)"):
            check_target(folder, target)
    check_target(folder, tmp_path / "llm-fp8")
    check_target(folder, tmp_path / "llm.safetensors")
    (tmp_path / "exists").mkdir()
    check_target(folder, tmp_path / "exists")


def test_an_output_folder_with_links_to_the_input_is_refused(folder, tmp_path):
    """A file of the output folder that is one of the input's files under another name is found."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(folder.root / "config.json")
    with pytest.raises(WriteError, match=r"out/config\.json: is the input"):
        check_target(folder, tmp_path / "out")


def test_a_sharded_set_is_not_written_onto(sharded, tmp_path):
    """Neither the set's folder nor one of its shards is an output."""
    for target in (sharded.root, sharded.root / "x.safetensors"):
        with pytest.raises(WriteError, match=r"is the input \S+x\.safetensors itself"):
            check_target(sharded, target)
    check_target(sharded, tmp_path / "out.safetensors")


def test_the_wrong_kind_of_output_is_refused(single, folder, tmp_path):
    """A folder cannot take the place of a file, nor a file that of a folder."""
    with pytest.raises(WriteError, match="is a folder; name a file"):
        check_target(single, tmp_path)
    (tmp_path / "notes.txt").write_text("n")
    with pytest.raises(WriteError, match=r"notes\.txt: is a file, but a folder will be written"):
        check_target(folder, tmp_path / "notes.txt")


def test_an_output_that_cannot_be_made_is_refused(single, tmp_path, monkeypatch):
    """A missing parent folder, a file in its place, and one without write permission are each named."""
    for target in (tmp_path / "none" / "out.safetensors", single.root / "in.safetensors" / "out.safetensors"):
        with pytest.raises(WriteError, match=r"is no folder that exists; create it first"):
            check_target(single, target)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WriteError, match=r"nothing can be written in .*check its permissions"):
        check_target(single, tmp_path / "out.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
def test_what_is_no_regular_file_is_not_replaced(single, tmp_path):
    """A pipe, which a renamed file would remove as it would a device, and a link to one are no outputs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(WriteError, match=rf"{name}: is a device or a pipe"):
            check_target(single, tmp_path / name)


def test_standard_output_is_not_replaced(single, tmp_path):
    """What stands for a descriptor is a link, and would be lost where that leads to a regular file."""
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "1").write_bytes(b"")
    (tmp_path / "stdout").symlink_to(tmp_path / "fd" / "1")
    with pytest.raises(WriteError, match="stdout: is a device or a pipe"):
        check_target(single, tmp_path / "stdout")


def test_an_output_has_a_name(single, folder, monkeypatch, tmp_path):
    """The folder that one is in cannot be put in place, nor can nothing; the error is not that of a path library."""
    monkeypatch.chdir(tmp_path)
    for source in (single, folder):
        for target in (".", "", "./"):
            with pytest.raises(WriteError, match=r"'\.': has no name of its own, .*name a file or folder"):
                check_target(source, target)


def test_a_folder_is_not_written_under_the_name_of_a_file(folder, tmp_path):
    """One model becomes one file under any spelling of the ending; several are a folder, which has none."""
    for name in ("out.safetensors", "out.SAFETENSORS", "out.sft"):
        assert is_single(folder, tmp_path / name)
    root = tmp_path / "pipe"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        save_file({name: torch.ones(2)}, root / name / "model.safetensors")
    with open_source(root) as source:
        for name in ("out.safetensors", "out.SFT"):
            with pytest.raises(WriteError, match=rf"{name}: is the name of a file, and the models in .* \(a, b\)"):
                check_target(source, tmp_path / name)
        check_target(source, f"{tmp_path}/out.safetensors/")


@pytest.mark.parametrize("name", ["out.pt", "out.ckpt", "out.BIN", "out.gguf", "out.json"])
def test_safetensors_are_not_written_under_the_name_of_something_else(single, tmp_path, name):
    """A program that goes by the ending would read a pickle, or refuse it; ComfyUI's own short ending is fine."""
    with pytest.raises(WriteError, match="would be safetensors under the name of"):
        check_target(single, tmp_path / name)
    with pytest.raises(WriteError, match="would be safetensors under the name of"):
        lowbit.save(torch.nn.Linear(2, 2), tmp_path / name)
    check_target(single, tmp_path / "out.sft")
