"""`localreason quant`: know, make and measure quantised files. Each command is a module of its own."""

import typer

from .quant_choose import choose
from .quant_convert import convert, imatrix
from .quant_inspect import inspect
from .quant_measure import measure

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Inspect, convert and measure model files."
)
app.command("measure")(measure)
app.command("choose")(choose)
app.command("convert")(convert)
app.command("imatrix")(imatrix)
app.command("inspect")(inspect)
