"""The `modicum` command: one verb per file; refusals are one line on stderr, answers alone go to stdout."""

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from modicum import __version__
from modicum.cli import (
    caption,
    certify,
    classify,
    compare,
    convert,
    convert_video,
    demo,
    evaluate,
    generate,
    inspect,
    train,
    uptrain,
)
from modicum.cli.common import INTERRUPTED
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
app.command(epilog=certify.EXAMPLES)(certify.certify)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=classify.EXAMPLES)(classify.classify)
app.command(epilog=caption.EXAMPLES)(caption.caption)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=uptrain.EXAMPLES)(uptrain.uptrain)
app.command(epilog=convert_video.EXAMPLES)(convert_video.convert_video)
app.command()(demo.demo)


def run() -> None:
    """Entry point: exit code 2 for usage, 1 for failure, 130 for Ctrl-C."""
    # Taken wherever it stands: one adds it at the end of the command that has just failed.
    debug = "--debug" in sys.argv[1:]
    warnings.formatwarning = lambda message, *_: f"modicum: {message}\n"
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    try:
        code = app(arguments, prog_name="modicum", standalone_mode=False)
    except ModicumError as error:
        fail(str(error), error.exit_code, debug=debug)
    except ClickError as error:
        fail(error.format_message().replace("\n", " "), error.exit_code, debug=debug)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # Whoever reads stdout has gone; Python must not complain again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        fail(f"{type(error).__name__}: {reason} (--debug shows where)", 1, debug=debug)
    if code == INTERRUPTED:  # typer turns Ctrl-C within a command into this result
        fail("interrupted", INTERRUPTED, debug=False)
    sys.exit(code if isinstance(code, int) else 0)


def fail(sentence: str, code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"modicum: {sentence}", file=sys.stderr)
    sys.exit(code)
