"""Video vision transformers (2103.15691): build, load and start them."""

from modicum.vivit.build import build
from modicum.vivit.initialization import init_from_image, init_from_video, resize
from modicum.vivit.load import from_scenic

__all__ = ["build", "from_scenic", "init_from_image", "init_from_video", "resize"]
