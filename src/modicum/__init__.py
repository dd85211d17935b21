"""Transformers that watch, read and write, on a modicum of compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.api import caption, classify, convert_to_gqa, generate, load, read_checkpoint, save, write_checkpoint

__version__ = "0.1.0"
__all__ = ["caption", "classify", "convert_to_gqa", "generate", "load", "read_checkpoint", "save", "write_checkpoint"]

MODULES = ("api", "vivit")


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import modicum` does not wait for PyTorch.
    if name in __all__:
        return getattr(import_module("modicum.api"), name)
    if name in MODULES:
        return import_module(f"modicum.{name}")
    raise AttributeError(f"module `modicum` has no attribute `{name}`")


def __dir__() -> list[str]:
    return [*__all__, *MODULES, "__version__"]
