"""Models that read something and write about it, so that what is true of one code path is asked of all of them."""

from dataclasses import dataclass, field
from typing import Any

import torch

import modicum
from modicum.config import RopeConfig
from tests.helpers import clips, prompts, tiny_captioner, tiny_t5


@dataclass
class Kind:
    """How a kind of model is made, and given what it writes about."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def of_text(self) -> bool:
        return self.name == "t5"

    def make(self, seed: int = 0, **changes: Any) -> Any:
        return tiny_t5(seed, **changes) if self.of_text else tiny_captioner(seed, **{**self.settings, **changes})

    def sources(self, lengths: list[int], seed: int = 3) -> list[Any]:
        """Texts of so many tokens, or clips of twice as many frames: tubelets have two."""
        return prompts(lengths, seed=seed) if self.of_text else clips([2 * n for n in lengths], seed)

    def write(self, model: Any, sources: list[Any], **settings: Any) -> Any:
        return (modicum.generate if self.of_text else modicum.caption)(model, sources, **settings)

    def held(self, model: Any, source: Any) -> Any:
        """What a request has of a source."""
        return source if self.of_text else model.encode(source[None])[0]

    def logits(self, model: Any, source: Any, ids: list[int]) -> torch.Tensor:
        """Of a whole text behind the start token, without a cache: [1, L, V]."""
        given = torch.tensor([source]) if self.of_text else source[None]
        return model(given, torch.tensor([[0, *ids]]))

    def slots(self, length: int) -> int:
        return length * (6 if self.settings.get("memory") == "patches" else 1)


LAYERED = {"norm": "layer", "gated": False, "ffn_bias": True, "qkv_bias": True, "out_bias": True}
T5 = Kind("t5")
FRAMES = Kind("frames")
PATCHES = Kind("patches", {"memory": "patches"})
LEARNED = Kind("learned-positions", {"rope": None, **LAYERED})
PARALLEL = Kind("parallel-blocks", {"rope": RopeConfig(rotary_dim=4), "parallel": True, **LAYERED})
NORMED = Kind("windows-and-qk-norm", {"windows": (3, None), "qk_norm": True})
KINDS = (T5, FRAMES, PATCHES)
CAPTIONERS = (FRAMES, PATCHES, LEARNED, PARALLEL, NORMED)


def name_of(kind: Kind) -> str:
    return kind.name
