"""`modicum train`: run a recipe."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Examples:

modicum train recipes/code-target.toml --dry-run

modicum train recipes/code-target.toml optim.steps=200 run.folder=runs/short

modicum train recipes/code-target.toml --resume

modicum train recipes/draft-heads.toml drafter.target=./big data.source=./texts

modicum train recipes/finetune.toml model.source=./gqa-8 data.pairs=train.jsonl data.held_out=dev.jsonl

modicum train vivit-synthetic

modicum train vivit-k400 data.format=folder data.root=./videos model.start=./vivit run.folder=runs/mine --dry-run

torchrun --nproc-per-node 8 -m modicum train vivit-k400 data.root=/data/k400"""


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or the name of one that ships with modicum.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, values as TOML writes them.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state, bit for bit.")] = False,
) -> None:
    """Train a language model, a drafter or a video classifier by a recipe, or fine-tune; Ctrl-C saves, --resume goes on as
    if nothing was."""
    from modicum import resources
    from modicum.train import run

    run.train(resources.recipe_path(recipe), overrides or [], dry_run=dry_run, resume=resume)
