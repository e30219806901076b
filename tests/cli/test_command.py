"""The command as a whole: help, version, progress and the ways it is started."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from safetensors.torch import save_file

import lowbit as package
from lowbit.cli import app, output
from tests.cli.conftest import tiny_model

COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_exit_codes(lowbit, name):
    """Each subcommand's help shows how it is called, the --json option, and what its exit codes mean."""
    done = lowbit(name, "--help")

    assert done.code == 0
    assert "Examples:" in done.out
    assert f"lowbit {name}" in done.out
    assert "--json" in done.out
    assert "130 interrupted" in done.out


@pytest.mark.parametrize("columns", [80, 119, 120])
@pytest.mark.parametrize(
    "words", [(), ("lora",), ("lora", "inspect"), ("lora", "bake"), *((name,) for name in COMMANDS)]
)
def test_help_does_not_cut_the_names_of_options(lowbit, words, columns):
    """Each name and what stands for its value is whole at the width of a usual terminal; so is each default."""
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]

    shown = lowbit(*words, "--help", columns=columns).out

    assert max(map(len, shown.splitlines())) <= columns
    for option in (option for option in command.params if not getattr(option, "hidden", False)):
        names = [*option.opts, *option.secondary_opts] if option.param_type_name == "option" else []
        for name in [*names, *([option.metavar] if option.metavar else [])]:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w…-])", shown), name
        if option.required:
            assert "[required]" in shown


def test_a_narrow_help_says_what_the_wide_one_says(lowbit):
    """Defaults, bounds and what stands in brackets of a text, none of them taken for markup."""
    narrow, wide = (" ".join(lowbit("calibrate", "--help", columns=width).out.split()) for width in (80, 300))

    for said in ("[default: 4.0]", "[default: auto]", "[default: for model", "x>=2", "0.0<=x<=1.0"):
        assert said in narrow
        assert said in wide
    assert "\\" not in narrow


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_what_stands_in_brackets(lowbit, name):
    """Brackets are no markup: defaults and shapes that a help text writes in them are to be read."""
    context = typer.main.get_command(app).commands[name]
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", lowbit(name, "--help").out).split())

    for parameter in context.params:
        for words in re.findall(r"\\?(\[[^\]]+\])", parameter.help or ""):
            assert words in shown, f"{parameter.name}: {words}"


def test_help_lists_every_subcommand(lowbit):
    """All that the issue asks for are there."""
    done = lowbit("--help")

    assert done.code == 0
    for name in ("convert", "plan", "inspect", "verify", "dequantize", "migrate", "doctor", "demo", "formats"):
        assert name in done.out


def test_version(lowbit):
    """--version is the package's."""
    assert lowbit("--version").out == f"lowbit {package.__version__}\n"


def test_an_unknown_option_ends_with_2(lowbit):
    """The message of the argument parser goes to stderr."""
    done = lowbit("inspect", "--unknown")

    assert done.code == 2
    assert "No such option" in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "a.safetensors", "--unknown"), "No such option"),
        (("inspect",), "Missing argument"),
        (("convert", "a.safetensors", "-o", "b.safetensors", "--seed", "x"), "Invalid value"),
        (("inspect", "a.safetensors", "--source-dialect", "klingon"), "'klingon' is unknown"),
        (("lora", "bake", "--rank"), "No such option"),
        (("unheard-of",), "No such command"),
    ],
)
def test_wrong_use_is_json_where_that_is_asked_for(lowbit, arguments, said):
    """A script that gave --json reads what is wrong on stdout, shaped as other errors are; people read it on stderr."""
    done = lowbit(*arguments, "--json")

    assert done.code == 2
    assert (set(done.json), done.json["exit_code"]) == ({"error", "kind", "exit_code"}, 2)
    assert said in done.json["error"]
    assert done.json["kind"] == "UsageError"
    assert said.split()[0] in done.err
    assert lowbit(*arguments).out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the pipes of POSIX")
@pytest.mark.parametrize("arguments", [("model",), ("model", "--json"), ("no", "--json")])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path, arguments):
    """`lowbit inspect FILE | head -1`: no traceback, no message, and the exit code of a program that SIGPIPE killed."""
    tiny_model(tmp_path / "model.safetensors")
    name, *more = arguments
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "inspect", str(tmp_path / f"{name}.safetensors"), *more],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)

    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.startswith("error: ")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs the pipes of POSIX")
@pytest.mark.parametrize(
    "arguments", [("--help",), ("convert", "--help"), ("lora", "--help"), (), ("--version",), ("no-such-command",)]
)
def test_help_that_nobody_reads_ends_quietly(arguments):
    """`lowbit --help | true`: what typer prints by itself ends as all other output does, not as problems found."""
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [sys.executable, "-m", "lowbit", *arguments],
        stdout=writer,
        stderr=writer if arguments == ("no-such-command",) else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)

    assert done.returncode == 141
    assert not done.stderr


def test_control_characters_in_names_do_not_reach_the_terminal(lowbit, tmp_path):
    """What a tensor is called cannot move the cursor or clear the screen: it is shown as repr shows it."""
    evil = "a\x1b[2J\x07\r\u202e"
    path = tmp_path / "model.safetensors"
    broken = {f"{evil}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}
    save_file({f"{evil}.weight": torch.ones(64, 64), f"{evil}.v": torch.full((64,), torch.nan), **broken}, path)

    for arguments in (("inspect", path), ("plan", path, "--format", "int8"), ("verify", path, path)):
        done = lowbit(*arguments)
        shown = done.out + done.err
        assert r"a\x1b[2J\x07\r\u202e" in shown
        assert [c for c in shown if not c.isprintable() and c != "\n"] == []


def test_it_runs_as_a_module_without_a_traceback(tmp_path):
    """`python -m lowbit` is the command, and an error in a fresh process is one line."""
    command = [sys.executable, "-m", "lowbit", "inspect", str(tmp_path / "no.safetensors")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_names_that_the_encoding_of_the_output_lacks_are_escaped(tmp_path):
    """A file in Cyrillic is shown on a terminal or in a pipe that has ASCII alone."""
    path = tiny_model(tmp_path / "model.safetensors", модель__weight=torch.ones(64, 64))
    command = [sys.executable, "-m", "lowbit", "inspect", str(path)]

    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u043c\u043e\u0434\u0435\u043b\u044c" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(("closed", "name", "code"), [(">&-", "model", 0), ("2>&-", "no", 3)])
def test_closed_streams_are_no_error(tmp_path, closed, name, code):
    """A service may start the command without an output or an error stream: the exit code says all."""
    tiny_model(tmp_path / "model.safetensors")
    command = f'exec "{sys.executable}" -m lowbit inspect "{tmp_path / name}.safetensors" {closed}'

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)

    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr


def test_brackets_in_names_are_no_markup(lowbit, tmp_path):
    """What a tensor is called is shown as it is, whatever it would mean in a style language."""
    named = {"a[/b]__weight": torch.ones(64, 64), "[bold]:heart:__weight": torch.ones(64, 64)}
    done = lowbit("plan", tiny_model(tmp_path / "model.safetensors", **named), "--format", "int8")

    assert done.code == 0
    assert "a[/b] " in done.out
    assert "[bold]:heart: " in done.out


def test_help_does_not_import_what_only_the_demo_needs():
    """`lowbit --help` stays quick: transformers is not imported for it."""
    program = "import sys, lowbit.cli; sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Yes."""
        return True


@pytest.mark.parametrize(("columns", "lines"), [(40, 6), (100, 4)])
def test_a_table_too_wide_for_the_terminal_is_shown_as_paragraphs(monkeypatch, columns, lines):
    """No name is broken into columns of a few letters: each row becomes a name and what is said of it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    made = output.table("layer", "format", "why", "SQNR", title="worst", right=("SQNR",))
    name = "transformer_blocks.0.attn.to_q"
    made.add_row(name, "int8(granularity=row)", "the format for all", "40.00 dB")
    made.add_row("b", "int8(granularity=row)", "", "41.00 dB")

    output.show(made)

    shown = terminal.getvalue().splitlines()
    assert max(map(len, shown)) <= columns
    assert any(line.rstrip() == name or line.startswith(f"{name} ") for line in shown)
    if columns == 40:
        assert shown[0] == "worst"
        assert [line.strip() for line in shown if line.startswith("  ")][-2:] == [
            "format int8(granularity=row); SQNR",
            "41.00 dB",
        ]
    assert len(shown) >= lines


def test_a_plan_does_not_break_names_at_80_characters(monkeypatch):
    """Columns that would fit by folding every name are no table: names are searched for, and pasted into options."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    made = output.table("layers", "x", "shape", "becomes", "before", "after", "why", right=("x", "before", "after"))
    name = "transformer_blocks.*.attn.add_k_proj"
    made.add_row(name, "60", "3072x3072", "int8 by rtn", "1.1 GB", "566.0 MB", "the format for all weights")

    output.show(made)

    assert name in terminal.getvalue()


def test_progress_shows_throughput_time_left_and_the_layer_on_a_terminal(monkeypatch):
    """One line that is rewritten, with bytes, bytes a second and the name of what was just done."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    with output.progress("converting") as update:
        update(25_000_000, 100_000_000, "blocks.3.attn.q")

    shown = terminal.getvalue()
    assert "converting" in shown
    assert "/100.0 MB" in shown
    assert "blocks.3.attn.q" in shown


def test_progress_is_silent_when_stderr_is_no_terminal(monkeypatch):
    """No update function, no character."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)

    with output.progress("converting") as update:
        assert update is None

    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mlp=int8", ("mlp", "int8")),
        ("a=b.*=int8(granularity=block,block_size=64x64)", ("a=b.*", "int8(granularity=block,block_size=64x64)")),
        (r"blocks\.\d+\.(q|k)=fp8_e4m3(granularity=row)", (r"blocks\.\d+\.(q|k)", "fp8_e4m3(granularity=row)")),
        ("mlp=svdquant_w4a4(rank=8)@tiles", ("mlp", "svdquant_w4a4(rank=8)@tiles")),
    ],
)
def test_a_layer_rule_is_split_before_its_format(text, rule):
    """The expression may hold "=" and parentheses, and so may the format."""
    assert output.split_rule(text) == rule


def test_warnings_are_called_so_where_another_library_renames_the_level(capsys, monkeypatch):
    """`logging` has one table of names for all of a process."""
    monkeypatch.setitem(logging._levelToName, logging.WARNING, "MINIMAL")
    record = logging.getLogger("lowbit").makeRecord("lowbit", logging.WARNING, "f", 1, "few tokens", (), None)
    output._Warnings(logging.WARNING).emit(record)
    assert capsys.readouterr().err == "warning: few tokens\n"
