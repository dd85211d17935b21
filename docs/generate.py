"""Write docs/cli.md, the command reference, from the program's own help. `--check` only says whether it is current."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VERBS = (
    "generate",
    "compare",
    "certify",
    "evaluate",
    "classify",
    "caption",
    "inspect",
    "train",
    "convert",
    "uptrain",
    "convert-video",
    "demo",
)


def help_of(*arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-c", "from modicum.cli.main import run; run()", *arguments, "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in text.replace("Usage: -c", "Usage: modicum").strip().splitlines())


def reference() -> str:
    parts = ["# Command reference\n\nMade by `make docs`; do not edit.\n"]
    for verb in ("", *VERBS):
        title = f"modicum {verb}".strip()
        parts.append(f"## {title}\n\n```\n{help_of(*([verb] if verb else []))}\n```\n")
    return "\n".join(parts)


def main() -> None:
    page = HERE / "cli.md"
    text = reference()
    if "--check" in sys.argv:
        if page.read_text() != text:
            sys.exit("docs/cli.md is out of date: run `make docs`")
    else:
        page.write_text(text)


if __name__ == "__main__":
    main()
