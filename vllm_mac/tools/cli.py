"""The command `vllm-mac`: its commands together. Importing it imports neither torch nor vLLM; running one does."""

import signal
from typing import Annotated

import typer

from vllm_mac import __version__
from vllm_mac.tools.bench.cli import app as bench
from vllm_mac.tools.calibrate.cli import calibrate
from vllm_mac.tools.doctor.cli import doctor
from vllm_mac.tools.eval.cli import evaluate

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command()(doctor)
app.command("eval")(evaluate)


def main() -> None:
    # `timeout` and job schedulers send SIGTERM; the command still writes what it has measured.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "vllm"):
            raise
        wanting = 'install vLLM beside vllm-mac: pip install ".[cuda]", or without a GPU: bash examples/install.sh VENV'
        typer.echo(f"{error.name}: not installed; {wanting}", err=True)
        raise SystemExit(1) from None


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """MAC attention for vLLM."""
