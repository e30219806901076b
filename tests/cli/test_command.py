"""The command as a whole: help, version, progress and the ways it is started."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import typer

import lowbit as package
from lowbit.cli import app, output

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


def test_it_runs_as_a_module_without_a_traceback(tmp_path):
    """`python -m lowbit` is the command, and an error in a fresh process is one line."""
    command = [sys.executable, "-m", "lowbit", "inspect", str(tmp_path / "no.safetensors")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help_does_not_import_what_only_the_demo_needs():
    """`lowbit --help` stays quick: transformers is not imported for it."""
    program = "import sys, lowbit.cli; sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Yes."""
        return True


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
