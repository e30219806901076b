"""What the command says to files that are not as they should be: one line, an exit code, and nothing changed."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import calibrate
from lowbit.checkpoint import writer


def assert_one_line(outcome, code, *words):
    """The outcome is this exit code and one line on stderr that contains the words."""
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


COMMANDS = [
    ("convert", "{src}", "-o", "{out}", "--format", "int8"),
    ("plan", "{src}", "--format", "int8"),
    ("inspect", "{src}"),
    ("verify", "{src}", "{src}"),
    ("dequantize", "{src}", "-o", "{out}"),
    ("migrate", "{src}", "-o", "{out}"),
]
each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])


def fill(command, src, tmp_path):
    """The command with its paths."""
    return [part.format(src=src, out=tmp_path / "out.safetensors") for part in command]


@each_command
def test_a_missing_file_ends_with_3(lowbit, tmp_path, command):
    """Every subcommand names the file that is not there."""
    assert_one_line(lowbit(*fill(command, tmp_path / "no.safetensors", tmp_path)), 3, "no.safetensors")


@pytest.mark.parametrize("command", ["convert", "dequantize", "migrate"])
def test_a_single_file_does_not_become_a_file_named_like_a_folder(lowbit, model, quantized, tmp_path, command):
    """`-o outdir/` says that a folder is meant: an error, whether it is there or not, and never a file `outdir`."""
    read = (model, "--format", "int8") if command == "convert" else (quantized,)

    done = lowbit(command, *read, "-o", f"{tmp_path / 'outdir'}{os.sep}")

    assert_one_line(done, 4, "outdir: is a folder; name a file to write, such as")
    assert not (tmp_path / "outdir").exists()


def shard(tmp_path, path, *, index):
    """A model of two shards in a folder, the first of which is `path`'s tensors, with or without an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    tensors = load_file(path)
    names = {key: f"model-0000{1 + key.startswith('blocks.1')}-of-00002.safetensors" for key in tensors}
    for name in set(names.values()):
        save_file({key: value for key, value in tensors.items() if names[key] == name}, folder / name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("command", ["convert", "plan", "dequantize", "migrate"])
def test_one_shard_of_several_is_warned_of(lowbit, model, quantized, tmp_path, command, index):
    """It is read as asked, but the index beside it, or the folder, is probably what was meant; inspecting is usual."""
    one = shard(tmp_path, model if command in ("convert", "plan") else quantized, index=index)
    more = () if command == "plan" else ("-o", tmp_path / "out.safetensors")

    done = lowbit(command, one, *more, *(("--format", "int8") if command in ("convert", "plan") else ()))

    assert done.code == 0
    said = f"warning: {one}: is one of 2 shards, and the others are not read; for the whole model give the index "
    assert (said in done.err) == index
    assert (f"{one.parent / 'model.safetensors.index.json'}, or the folder {one.parent}" in done.err) == index
    assert lowbit("inspect", one).err == ""


@each_command
def test_a_truncated_file_ends_with_3(lowbit, model, tmp_path, command):
    """Every subcommand refuses a file that is shorter than its header says, and writes nothing."""
    model.write_bytes(model.read_bytes()[:-100])

    assert_one_line(lowbit(*fill(command, model, tmp_path)), 3, "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_error_is_also_one_json_document(lowbit, tmp_path):
    """With --json an error is a document on stdout beside the line on stderr."""
    done = lowbit("inspect", tmp_path / "no.safetensors", "--json")

    assert_one_line(done, 3)
    assert done.json["exit_code"] == 3
    assert done.json["kind"] == "CheckpointError"


def test_a_weight_with_nan_ends_with_3(lowbit, model, tmp_path):
    """The error names the layer, and no output appears."""
    tensors = load_file(model)
    tensors["blocks.1.mlp.up.weight"][3, 5] = float("nan")
    save_file(tensors, model)

    done = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8")

    assert_one_line(done, 3, "blocks.1.mlp.up", "NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_output_that_is_the_input_ends_with_4(lowbit, model, tmp_path):
    """Also through a link; the input keeps its bytes."""
    before, link = model.read_bytes(), tmp_path / "link.safetensors"
    link.symlink_to(model)

    for target in (model, link):
        assert_one_line(lowbit("convert", model, "-o", target, "--format", "int8"), 4, "is the input")

    assert model.read_bytes() == before


@pytest.mark.parametrize("command", ["convert", "dequantize", "migrate"])
def test_an_output_folder_that_is_missing_ends_with_4(lowbit, model, quantized, tmp_path, command):
    """Every subcommand that writes says that the folder of its output is not there."""
    source, more = (model, ["--format", "int8"]) if command == "convert" else (quantized, [])

    done = lowbit(command, source, "-o", tmp_path / "nowhere" / "out.safetensors", *more)

    assert_one_line(done, 4, "no folder that exists")


def test_a_folder_without_permission_ends_with_4(lowbit, model, tmp_path, monkeypatch):
    """Nothing is written where the system says that nothing may be written."""
    monkeypatch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)

    assert_one_line(lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8"), 4, "permissions")


def test_a_full_disk_ends_with_4(lowbit, model, tmp_path, monkeypatch):
    """What goes wrong while writing is the output's fault, and what was read is not blamed."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_all", full)

    assert_one_line(lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8"), 4, "no space")


@pytest.mark.parametrize("file", ["plan", "report"])
def test_a_plan_or_report_that_cannot_be_written_ends_with_4(lowbit, model, tmp_path, file):
    """The files beside the model are outputs too."""
    path = tmp_path / "nowhere" / "file"
    if file == "plan":
        done = lowbit("plan", model, "--format", "int8", "-o", path)
    else:
        done = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8", "--report", path)

    assert_one_line(done, 4, "cannot be written")


def test_quantized_input_is_refused_unless_asked_for(lowbit, quantized, tmp_path):
    """Converting twice needs --requantize, because it loses twice."""
    arguments = ["convert", quantized, "-o", tmp_path / "out.safetensors", "--format", "int8"]

    assert_one_line(lowbit(*arguments), 2, "quantized already", "requantize")
    again = lowbit(*arguments, "--requantize", "--json").json

    assert {layer["format"] for layer in again["layers"]} == {"int8(rotation=64)"}


@pytest.mark.parametrize("command", ["dequantize", "migrate"])
def test_a_plain_file_holds_nothing_to_decode(lowbit, model, tmp_path, command):
    """What is not quantized is said to be so."""
    assert_one_line(lowbit(command, model, "-o", tmp_path / "out.safetensors"), 3, "no quantized layer")


def test_an_unknown_format_in_a_file_is_the_fault_of_the_file(lowbit, quantized, tmp_path):
    """A marker with a format nobody knows ends with 3, not 2, and names the layer."""
    tensors = load_file(quantized)
    marker = next(key for key in tensors if key.endswith(".comfy_quant"))
    tensors[marker] = torch.tensor(list(b'{"format": "float3"}'), dtype=torch.uint8)
    save_file(tensors, quantized)

    done = lowbit("dequantize", quantized, "-o", tmp_path / "out.safetensors")

    assert_one_line(done, 3, "float3", marker.removesuffix(".comfy_quant"))


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_result_that_cannot_be_printed_ends_with_4(lowbit, model, monkeypatch, how):
    """A full disk behind stdout is one line on stderr, never a traceback."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowbit.cli.output.stdout", full)
    monkeypatch.setattr("lowbit.cli.output.json.dumps", full)

    assert_one_line(lowbit("inspect", model, *how), 4, "the result cannot be printed: no space left")


@pytest.mark.parametrize("left", ["", ".partial", ".progress"])
def test_an_interrupt_promises_only_what_is_there(lowbit, model, tmp_path, monkeypatch, left):
    """Work is said to be kept where there is some to go on with, and not where the interrupt came before."""
    output = tmp_path / "out.safetensors"

    def interrupted(*_, **__):
        if left:
            (tmp_path / f"{output.name}{left}").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.cli.convert.run", interrupted)
    done = lowbit("convert", model, "-o", output, "--format", "int8")

    assert done.code == 130
    assert done.err.startswith("interrupted")
    assert ("is kept" in done.err) == bool(left)


def test_a_folder_that_cannot_be_entered_ends_with_3(lowbit, model, monkeypatch):
    """What the system refuses is one line that names the path, whichever call it was."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(model))

    monkeypatch.setattr("lowbit.cli.convert.open_whole", refused)

    assert_one_line(lowbit("convert", model, "-o", "x", "--format", "int8"), 3, "model.safetensors: Permission denied")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_of_any_bytes_is_shown_in_a_report(lowbit, model, tmp_path):
    """A name in Latin-1 is no UTF-8: the report shows its bytes."""
    path = model.rename(tmp_path / os.fsdecode(b"gr\xf6.safetensors"))
    page = tmp_path / "report.html"

    done = lowbit("convert", path, "-o", tmp_path / "out.safetensors", "--format", "int8", "--report", page, "--json")

    assert done.code == 0
    assert r"gr\udcf6.safetensors" in page.read_text(encoding="utf-8")


def test_what_to_run_next_is_quoted(lowbit, model, tmp_path):
    """The command that `plan` proposes works as it stands, whatever the names have in them."""
    path = model.rename(tmp_path / "a model's.safetensors")
    plan = tmp_path / "my plan.json"

    text = lowbit("plan", path, "--format", "int8", "-o", plan).out.partition("then: ")[2]

    assert shlex.split(text)[1:] == ["convert", str(path), "-o", "OUT", "--plan", str(plan)]


def test_a_full_disk_leaves_nothing_of_a_gguf_file(lowbit, model, tmp_path, monkeypatch):
    """Also where what is buffered cannot be written at the end, as on a disk without a byte left."""
    gguf = pytest.importorskip("gguf")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for method in ("write_header_to_file", "close"):
        monkeypatch.setattr(gguf.GGUFWriter, method, full)

    assert_one_line(lowbit("export", model, "-o", tmp_path / "x.gguf"), 4, "x.gguf: cannot be written: No space left")

    def short(*_, **__):
        raise OSError("16384 requested and 0 written")  # as numpy says it, without a number

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", short)
    assert_one_line(lowbit("export", model, "-o", tmp_path / "x.gguf"), 4, "cannot be written: 16384 requested and 0")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="a file's mode says little there")
@pytest.mark.parametrize(
    "command", ["inspect", "verify", "compare", "lora inspect", "convert --plan", "convert --stats"]
)
def test_a_file_that_may_not_be_read_ends_with_3(lowbit, model, tmp_path, monkeypatch, command):
    """One line that names it, as for one that is missing, before anything is written; not typer's error, with 2."""
    locked = tmp_path / "locked.safetensors"
    locked.write_bytes(model.read_bytes())
    own_access, own_open = os.access, io.open

    def access(path, mode, **more):
        return str(path) != str(locked) and own_access(path, mode, **more)

    def refused(path, *args, **more):
        if str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own_open(path, *args, **more)

    monkeypatch.setattr(os, "access", access)  # root may read all, whatever the mode
    monkeypatch.setattr(io, "open", refused)
    monkeypatch.setattr("builtins.open", refused)
    own_os_open = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *rest, **more: refused(path) if str(path) == str(locked) else own_os_open(path, *rest, **more),
    )
    name, *option = command.rsplit(" --", 1)
    arguments = [model, "-o", tmp_path / "x.safetensors", "--format", "int8"] if option else []
    arguments += (
        [f"--{option[0]}", locked] if option else [model, locked] if name in {"verify", "compare"} else [locked]
    )
    if option == ["plan"]:
        arguments = arguments[:3] + arguments[5:]

    done = lowbit(*name.split(), *arguments)

    assert_one_line(done, 2 if option == ["plan"] else 3, "locked.safetensors", "Permission denied")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locked.safetensors", "model.safetensors"]


def other_inputs(lowbit, model, tmp_path):
    """By name: a file that is read beside a checkpoint, and the command that reads it up to the output's name."""
    plan, sums, style = (tmp_path / name for name in ("plan.txt", "sums.safetensors", "style.safetensors"))
    for fmt, path in (("int8", plan), ("gguf(type=Q8_0)", tmp_path / "gguf.json")):
        assert lowbit("plan", model, "--format", fmt, "-o", path).code == 0
    save_file({"blocks.0.attn.q.lora_A.weight": torch.ones(2, 64), "blocks.0.attn.q.lora_B.weight": torch.ones(64, 2)},
              style)  # fmt: skip
    layer = torch.nn.Linear(64, 64)
    batch = torch.randn(64, 64)
    calibrate(layer, [batch], path=sums, names={"": "blocks.0.attn.q"}).close()
    return {
        "plan": (plan, "convert", model, "--plan", plan),
        "statistics": (sums, "convert", model, "--format", "int8", "--stats", sums),
        "plan of an export": (tmp_path / "gguf.json", "export", model, "--plan", tmp_path / "gguf.json"),
        "statistics of an export": (sums, "export", model, "--stats", sums),
        "adapter": (style, "lora", "bake", model, style),
    }


@pytest.mark.parametrize("name", ["plan", "statistics", "plan of an export", "statistics of an export", "adapter"])
def test_an_output_that_is_another_input_ends_with_4(lowbit, model, tmp_path, name):
    """Statistics that took hours, a plan edited by hand and an adapter are not replaced by what is made with them."""
    path, *command = other_inputs(lowbit, model, tmp_path)[name]
    before = path.read_bytes()

    assert_one_line(lowbit(*command, "-o", path), 4, f"{path}: is the input {path} itself")
    assert path.read_bytes() == before


def test_an_export_leaves_the_files_beside_the_weights(lowbit, model, tmp_path):
    """The config of the folder that is read is an input too."""
    folder = tmp_path / "folder"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")

    assert_one_line(lowbit("export", folder, "-o", folder / "config.json"), 4, "config.json: is the input")
    assert (folder / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["x.gguf", "x.GGUF", "x.json", "x.safetensors.index.json", "x.pt"])
def test_safetensors_are_not_written_under_names_that_read_as_something_else(lowbit, model, tmp_path, name):
    """The suffix decides how a file is opened: what was written could not be read again."""
    done = lowbit("convert", model, "-o", tmp_path / name, "--format", "int8")

    assert_one_line(done, 4, f"{name}: would be safetensors under the name of")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.json", "x"])
def test_gguf_is_not_written_under_other_names(lowbit, model, tmp_path, name):
    """The same of `export`."""
    done = lowbit("export", model, "-o", tmp_path / name)

    assert_one_line(done, 4, f"{name}: would be GGUF under another name", "name it x.gguf")
    assert not (tmp_path / name).exists()
