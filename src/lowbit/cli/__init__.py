"""The command `lowbit`: arguments and printing. One file a subcommand; the work is done on the floors below."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit import __version__
from lowbit.cli import (
    calibrate,
    compare,
    convert,
    demo,
    dequantize,
    doctor,
    export,
    formats,
    inspect,
    lora,
    migrate,
    plan,
    verify,
    warmup,
)
from lowbit.cli.group import Commands
from lowbit.cli.help_page import Command
from lowbit.cli.output import ending_quietly, epilog, make_streams_safe

app = typer.Typer(
    name="lowbit",
    cls=Commands,
    help="Take model weights from 16 bits to 8 and 4, prove what was lost, and run them.",
    epilog=epilog(
        "lowbit demo",
        "lowbit plan model.safetensors --format nvfp4",
        "lowbit convert model.safetensors -o model-nvfp4.safetensors --format nvfp4",
        "lowbit COMMAND --help",
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


def _paragraphs(doc: str | None) -> str:
    """A docstring with one line a paragraph: the help page breaks lines by itself."""
    return "\n\n".join(" ".join(text.split()) for text in (doc or "").split("\n\n"))


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _module, _command in (
    (convert, convert.convert),
    (plan, plan.plan),
    (inspect, inspect.inspect),
    (verify, verify.verify),
    (calibrate, calibrate.calibrate),
    (compare, compare.compare),
    (dequantize, dequantize.dequantize),
    (migrate, migrate.migrate),
    (export, export.export),
    (formats, formats.formats),
    (doctor, doctor.doctor),
    (warmup, warmup.warmup),
    (demo, demo.demo),
):
    app.command(cls=Command, help=_paragraphs(_command.__doc__), epilog=_module.EPILOG)(_command)

_lora = typer.Typer(
    help="LoRA adapters on quantized checkpoints.", no_args_is_help=True, rich_markup_mode="rich", epilog=lora.EPILOG
)
_lora.command(cls=Command, help=_paragraphs(lora.inspect.__doc__), epilog=lora.EPILOG)(lora.inspect)
_lora.command(cls=Command, help=_paragraphs(lora.bake.__doc__), epilog=lora.EPILOG)(lora.bake)
app.add_typer(_lora, name="lora")


def main() -> None:
    """Run the command with the arguments of the process."""
    make_streams_safe()
    with ending_quietly():
        app()
