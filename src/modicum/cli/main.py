"""The `modicum` command: one verb per file; refusals are one line on stderr, answers alone go to stdout."""

import os
import sys
from typing import Annotated, Any

import typer

from modicum import __version__
from modicum.cli import compare, demo, generate, inspect, train
from modicum.errors import ModicumError

app = typer.Typer(
    name="modicum",
    help="Transformers that watch, read and write, on a modicum of compute.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"modicum {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Options of every command come before its name."""


# typer carries a copy of click in some versions and depends on it in others; this names its base error in both.
ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=train.EXAMPLES)(train.train)
app.command()(demo.demo)


def run() -> None:
    """Entry point: exit code 2 for usage, 1 for failure, 130 for Ctrl-C."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if "--debug" in sys.argv[1:]:
        app(standalone_mode=False)
        return
    try:
        code = app(standalone_mode=False)
    except ModicumError as error:
        fail(str(error), error.exit_code)
    except ClickError as error:
        fail(error.format_message().replace("\n", " "), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever reads stdout has gone; Python must not complain again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        fail(f"{type(error).__name__}: {reason} (`modicum --debug ...` shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def fail(sentence: str, code: int) -> None:
    print(f"modicum: {sentence}", file=sys.stderr)
    sys.exit(code)
