"""The help page of a subcommand: typer's table where there is room for one, a list elsewhere, with every name whole."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand

from lowbit.cli.output import stdout

_LEAST_TABLE = 120  # characters of a line; with fewer the table cuts names of options, and breaks words


class Command(TyperCommand):
    """A subcommand whose help page can be read, and copied from, at 80 characters."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        console = stdout(piped=None)
        if console.width >= _LEAST_TABLE:
            super().format_help(ctx, formatter)
            return
        console.print(Padding(Text(self.get_usage(ctx), style="bold"), 1))
        console.print(Padding(Text.from_markup(self.help or ""), (0, 1, 1, 1)))
        parameters = [parameter for parameter in self.get_params(ctx) if parameter.get_help_record(ctx)]
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            found = [_entry(one, ctx) for one in parameters if one.param_type_name == kind]
            if found:
                console.print(Panel(Group(*found), title=title, title_align="left", border_style="dim"))
        ending = "\n".join(line.strip() for line in (self.epilog or "").split("\n\n"))
        console.print(Padding(Text.from_markup(ending), 1))


def _entry(parameter: Any, ctx: Any) -> Group:
    """The names of an option or argument, and below them what it does, its default and whether it is required."""
    names, words = parameter.get_help_record(ctx)
    if parameter.param_type_name == "argument" and parameter.metavar:
        names = parameter.metavar  # without its type
    said = parameter.help or ""
    extra = words.removeprefix(said).strip().replace("\\[", "[")  # no markup, escaped or not
    about = Text(" ").join([Text.from_markup(said), *([Text(extra, style="dim")] if extra else [])])
    return Group(Text(names, style="bold cyan"), Padding(about, (0, 0, 0, 4)))
