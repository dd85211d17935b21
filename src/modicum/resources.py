"""Files that ship with the package: reference models and recipes."""

from os import PathLike
from pathlib import Path

PACKAGE = Path(__file__).parent


def model_presets() -> dict[str, Path]:
    """Names of the models that ship with modicum, and their folders."""
    folders = sorted((PACKAGE / "models").glob("*/config.json"))
    return {f"modicum-{config.parent.name}": config.parent for config in folders}


def recipe_path(name: str | PathLike[str]) -> Path:
    """A recipe by path, or by the name of one that ships with modicum ("code-target", "recipes/code-target.toml")."""
    path = Path(name)
    # A path that leads elsewhere and does not exist is a mistake; it must not run another recipe than the one meant.
    if path.exists() or path.parent not in (Path("."), Path("recipes")):
        return path
    # In a wheel the recipes are inside the package, in a source checkout beside src/.
    for folder in (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes"):
        shipped = folder / f"{path.stem}.toml"
        if shipped.is_file():
            return shipped
    return path
