"""Video vision transformers (2103.15691): build, load and start them."""

from modicum.vivit.build import build

__all__ = ["build"]
