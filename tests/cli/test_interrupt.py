"""Ctrl-C, from the first moment of the process on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")

INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\n"


def run(command, folder, **env):
    """A process of Python that takes Ctrl-C also where the tests run in the background, where it is ignored."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
        cwd=folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def interrupted(tmp_path):
    """A function that runs a command in which the import of PyTorch is interrupted."""
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(INTERRUPT)
    path = os.pathsep.join([str(stub.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

    return lambda *command: run(command, tmp_path, PYTHONPATH=path)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "lowbit"),
        ("-X", "utf8", "-m", "lowbit", "convert", "-m", "x"),
        ("-mlowbit", "--help"),
        ("lowbit", "convert"),
        ("./lowbit",),
    ],
)
def test_an_interrupt_while_the_command_starts_is_one_word(interrupted, tmp_path, command):
    """As a module and as the program that pip installs: 130, and no traceback from within an import."""
    (tmp_path / "lowbit").write_text("from lowbit.cli import main\nmain()\n")

    done = interrupted(*command)

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("arguments", [(), ("lowbit",), ("-m", "lowbit")])
def test_a_program_that_imports_lowbit_has_its_own_say(interrupted, tmp_path, arguments):
    """There Ctrl-C is the exception that it always is, whatever the program's arguments are."""
    program = "try:\n    import lowbit\nexcept KeyboardInterrupt:\n    print('mine')\n"
    (tmp_path / "program.py").write_text(program)

    for command in (("-c", program), ("program.py",), ("-m", "program")):
        done = interrupted(*command, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")


def test_an_interrupt_of_the_work_is_an_exception(tmp_path):
    """When the subcommand has begun there is something to put in order: it is not ended on the spot."""
    (tmp_path / "factory.py").write_text(
        f"def make():\n    try:\n        {INTERRUPT.replace(chr(10), chr(10) + ' ' * 8).strip()}\n"
        "    finally:\n        print('put in order', flush=True)\n"
    )
    command = ("-m", "lowbit", "calibrate", "--module", "factory.py:make", "-o", "stats.safetensors")

    done = run(command, tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (130, "put in order\n", "interrupted\n")
