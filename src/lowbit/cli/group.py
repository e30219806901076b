"""How the whole command ends where no subcommand can tell: a wrong option, and an output that nobody reads any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from lowbit.cli.output import Exit, OutputClosed, print_json

_WrongUse: type[Exception] = typer.BadParameter.__bases__[0]  # click's, which typer brings in itself or not


class Commands(TyperGroup):
    """The subcommands.

    Where --json is asked for, an error of the argument parser is a JSON document on stdout, as any other error is. A
    reader that has seen enough (`lowbit inspect FILE | head -1`) ends the command without a word.
    """

    _as_json = False

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Parse the options before the subcommand's name."""
        options = args[: args.index("--")] if "--" in args else args
        self._as_json = "--json" in options
        with self._ending():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest and run the subcommand."""
        with self._ending():
            return super().invoke(ctx)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            try:
                yield
            except _WrongUse as error:  # typer says it on stderr
                if self._as_json:
                    message = error.format_message()  # type: ignore[attr-defined]
                    print_json({"error": message, "kind": "UsageError", "exit_code": int(Exit.USAGE)})
                raise
        except OutputClosed:
            raise typer.Exit(Exit.CLOSED) from None
