"""What every subcommand shares: where text goes, how it ends, and the progress line.

stdout carries the result: tables, or with --json exactly one JSON document. stderr carries the progress, warnings and
the one line of an error. Exit codes are those of `Exit`.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from lowbit.cli.printable import printable
from lowbit.errors import CheckpointError, LowbitError, PlanError, WriteError
from lowbit.starting import begun

PIPE_WIDTH = 200  # characters of a line where there is no terminal to ask
_NAME_WIDTH = 36
_LEAST_WIDTH = 14  # of a column of words; a table that leaves them less is shown as paragraphs
_NOT_REACHED = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO}
Update = Callable[[int, int, str], None]
Command = TypeVar("Command", bound=Callable[..., None])
Dtype = TypeVar("Dtype")
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class Exit(IntEnum):
    """The exit codes of the command."""

    OK = 0
    FOUND = 1  # the command did its work and found problems, or quality below the threshold
    USAGE = 2  # what was asked cannot be done: an option, a plan or a selection is wrong
    INPUT = 3  # an input file is missing, broken or does not hold what is needed
    OUTPUT = 4  # the output cannot be written
    INTERRUPTED = 130
    CLOSED = 141  # whoever read the output has ended, as `head` does; what a program killed by SIGPIPE ends with


CODES = (
    "Exit codes: 0 done, 1 problems found or below the threshold, 2 wrong option, plan or selection, 3 bad input, "
    "4 output cannot be written, 130 interrupted, 141 nobody reads the output any more."
)


class Failure(Exception):  # noqa: N818  (it carries an exit code; the error is its cause)
    """An error that has been given its exit code."""

    def __init__(self, code: Exit, error: LowbitError) -> None:
        super().__init__(str(error))
        self.code, self.error = code, error


class OutputClosed(Exception):  # noqa: N818  (no error of this command)
    """Nobody reads stdout or stderr any more."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process with 1."""
        _discard(sys.stderr if self.stderr else sys.stdout)


def _discard(stream: TextIO) -> NoReturn:
    """Send what is still to be written nowhere, or Python would try again as it ends. Raises `OutputClosed`."""
    _send_nowhere(stream)
    raise OutputClosed


def _flush_or_drop(stream: TextIO) -> None:
    """Write what is still to be written, if anybody reads it: else Python tries as it ends, and ends with 120."""
    try:
        stream.flush()
    except BrokenPipeError:
        _send_nowhere(stream)


def _send_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def stdout(piped: int | None = PIPE_WIDTH) -> Console:
    """Where the result goes: plain when that is no terminal, and `piped` wide (None: as COLUMNS says, or 80)."""
    return _console(error=False, piped=piped)


def stderr() -> Console:
    """Where everything else goes."""
    return _console(error=True)


def _console(*, error: bool, piped: int | None = PIPE_WIDTH) -> Console:
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else piped
    return _Console(stderr=error, width=width, highlight=False, soft_wrap=False, markup=False, emoji=False)


def make_streams_safe() -> None:
    """Let any name be printed: escaped where the encoding lacks a character, nowhere where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def ending_quietly() -> Iterator[None]:
    """End with `Exit.CLOSED` where nobody reads what typer itself prints: help, the version, an error of its parser.

    Typer, and rich for it, end the process with 1 then, which is the code of problems found.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            for stream in (sys.stdout, sys.stderr):
                _flush_or_drop(stream)
            raise SystemExit(Exit.CLOSED) from None
        raise


def epilog(*examples: str) -> str:
    """The end of a help page: examples, one a line, and the exit codes."""
    return "\n\n".join(["Examples:", *(f"  {line}" for line in examples), CODES]).replace("[", r"\[")


def print_json(data: Any) -> None:
    """The one JSON document on stdout."""
    try:
        sys.stdout.write(json.dumps(_storable(data), indent=2, default=str, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def _storable(data: Any) -> Any:
    """The same with infinities and NaN as text: JSON has none."""
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Mapping):
        return {key: _storable(value) for key, value in data.items()}
    return [_storable(value) for value in data] if isinstance(data, list | tuple) else data


def say(text: str, style: str = "") -> None:
    """One line of the result; nothing in it is markup, and control characters are escaped."""
    stdout().print(Text(printable(text, lines=True), style=style), soft_wrap=True)


def warn(text: str, kind: str = "warning", style: str = "yellow") -> None:
    """One line on stderr, its kind before it; nothing in it is markup, and control characters are escaped."""
    line = Text.assemble((f"{kind}: ", style), printable(text, lines=True))
    stderr().print(line, soft_wrap=True)


def show_notes(notes: Iterable[str]) -> None:
    """Notes, one a line; what is said of many layers alike stands once, with the first one's name."""
    alike: dict[str, list[str]] = {}
    for note in notes:
        name, colon, said = note.partition(": ")
        alike.setdefault(said if colon else note, []).append(note if not colon else name)
    for said, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"note: {said}" if names[0] == said else f"note: {names[0]}{more}: {said}", "yellow")


class _Table(Table):
    def add_row(self, *cells: Any, **look: Any) -> None:
        """Control characters are escaped."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **look)


def table(*columns: str, title: str = "", right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    made = _Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold"
    )
    for column in columns:
        number = column in right
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def show(made: Table, *, names: bool = True) -> None:
    """Print a table and an empty line; on a narrow terminal a paragraph for each row, which can be read there.

    `names`: the first column has names of layers and the like, which are not to be broken.
    """
    console = stdout()
    cells = [[str(cell) for cell in column.cells] for column in made.columns]
    headers = [str(column.header) for column in made.columns]
    longest = [max(map(cell_len, (header, *column))) for header, column in zip(headers, cells, strict=True)]
    made.columns[0].no_wrap |= names
    least = [
        full if column.no_wrap else min(full, _LEAST_WIDTH) for full, column in zip(longest, made.columns, strict=True)
    ]
    if sum(least) + 2 * (len(least) - 1) <= console.width:
        console.print(made)
    else:
        _show_paragraphs(console, str(made.title or ""), headers, list(zip(*cells, strict=True)))
    console.print()


def _show_paragraphs(console: Console, title: str, headers: list[str], rows: list[tuple[str, ...]]) -> None:
    """The first cell of each row, and the others below it with their headers."""
    if title:
        console.print(Text(title, style="bold"))
    for name, *others in rows:
        console.print(Text(name, style="bold"), soft_wrap=True)
        said = [f"{header} {cell}".strip() for header, cell in zip(headers[1:], others, strict=True) if cell]
        console.print(Padding(Text("; ".join(said)), (0, 0, 0, 2)))


def size(count: float) -> str:
    """Bytes in words: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def decibels(value: float | None) -> str:
    """An SQNR in words."""
    return "-" if value is None else "exact" if value == float("inf") else f"{value:.2f} dB"


# ---- how a command ends ---------------------------------------------------------------------------------------------


def command(function: Command) -> Command:
    """Decorator of a subcommand: an error becomes one line on stderr and an exit code, never a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        _show_warnings()
        try:
            begun()
            function(*args, **kwargs)
        except Failure as failure:
            _fail(failure.code, failure.error, as_json=kwargs.get("as_json", False))
        except PlanError as error:
            _fail(Exit.USAGE, error, as_json=kwargs.get("as_json", False))
        except WriteError as error:
            _fail(Exit.OUTPUT, error, as_json=kwargs.get("as_json", False))
        except LowbitError as error:
            _fail(Exit.INPUT, error, as_json=kwargs.get("as_json", False))
        except KeyboardInterrupt:
            keeps = kwargs.get("resume", False) and _unfinished(kwargs.get("output"))
            more = ". The work done so far is kept: run the same command again to go on" if keeps else ""
            stderr().print(Text(f"interrupted{more}"), soft_wrap=True)
            raise typer.Exit(Exit.INTERRUPTED) from None
        except OSError as error:
            if error.errno in _NOT_REACHED and error.filename is not None:
                failed = CheckpointError(f"{error.filename}: {error.strerror}; check the path and its permissions")
                _fail(Exit.INPUT, failed, as_json=kwargs.get("as_json", False))
            if error.errno != errno.ENOSPC:
                raise
            stderr().print("error: the result cannot be printed: no space left; see where it is sent to")
            raise typer.Exit(Exit.OUTPUT) from None

    return run  # type: ignore[return-value]


def _unfinished(output: str | Path | None) -> bool:
    """Whether an interrupted run has left work that the next one goes on with."""
    if output is None:
        return False
    target = Path(output)
    return any(target.with_name(target.name + end).exists() for end in (".partial", ".progress"))


def _fail(code: Exit, error: LowbitError, *, as_json: bool) -> None:
    warn(str(error), "error", "bold red")
    if as_json:
        print_json({"error": str(error), "kind": type(error).__name__, "exit_code": int(code)})
    raise typer.Exit(code) from None


@contextmanager
def asking() -> Iterator[None]:
    """Errors in here are about what the user asked for, not about a file."""
    try:
        yield
    except LowbitError as error:
        raise Failure(Exit.USAGE, error) from error


class _Warnings(logging.Handler):
    """Writes warnings of the library as single lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage(), "error" if record.levelno >= logging.ERROR else "warning")  # others rename levels


@contextmanager
def hearing() -> Iterator[list[str]]:
    """The warnings of the library while this lasts, for --json; they go to stderr as ever."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("lowbit")
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)


def _show_warnings() -> None:
    log = logging.getLogger("lowbit")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))


# ---- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def progress(what: str) -> Iterator[Update | None]:
    """A line with throughput and time left on stderr, gone at the end. None, and silence, where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}", style="dim", markup=False),
    )
    with Progress(*columns, console=stderr(), transient=True, expand=True) as line:
        task = line.add_task(what, total=None, layer="")

        def update(done: int, total: int, name: str) -> None:
            line.update(task, completed=done, total=total, layer=printable(name[-_NAME_WIDTH:]))

        yield update


# ---- values of options ----------------------------------------------------------------------------------------------


def split_rule(text: str) -> tuple[str, str]:
    """`REGEX=FORMAT` at the last "=" outside of the format's parentheses. Raises `PlanError`."""
    found = re.fullmatch(r"(.+?)=([A-Za-z0-9_]+\s*(?:\([^()]*\))?(?:\s*@\s*\w+)?)", text.strip(), re.DOTALL)
    if not found:
        raise PlanError(f"--layer {text!r}: write it as REGEX=FORMAT, such as 'mlp=int8(granularity=row)'")
    return found[1], found[2]


def parse_dtype(name: str, known: Mapping[str, Dtype], *others: str) -> Dtype:
    """The dtype of --dtype among those known by their names, short ones too. Raises `PlanError`.

    `others`: what else the option takes, in words of its own.
    """
    found = _SHORT_DTYPES.get(name, name)
    if found not in known:
        raise PlanError(f"--dtype {name!r} is unknown; choose one of {', '.join([*known, *others])}")
    return known[found]


def parse_shape(text: str) -> tuple[int, int]:
    """`NxK` as numbers. Raises `PlanError`."""
    found = re.fullmatch(r"(\d+)[xX*](\d+)", text.strip())
    if not found or not int(found[1]) or not int(found[2]):
        raise PlanError(f"--shape {text!r}: write it as NxK, out features by in features, such as 3072x12288")
    return int(found[1]), int(found[2])
