"""Files that ship with the package: reference models and recipes."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"


def model_presets() -> dict[str, Path]:
    """Names of the models that ship with modicum, and their folders."""
    if not MODELS.is_dir():
        return {}
    return {
        f"modicum-{folder.name}": folder for folder in sorted(MODELS.iterdir()) if (folder / "config.json").exists()
    }
