"""Which options a user wrote: one that changes nothing is a misunderstanding, and is refused."""

from __future__ import annotations

import typer

from lowbit.errors import PlanError


def refuse_idle(context: typer.Context, why: str, *names: str) -> None:
    """Raise `PlanError` if one of these parameters stands on the command line. `why` goes on from the option's name."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            parameter = next(parameter for parameter in context.command.params if parameter.name == name)
            raise PlanError(f"{max(parameter.opts, key=len)} {why}; leave it out")
