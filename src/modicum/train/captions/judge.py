"""How well held-out captions are predicted, token by token: what a run is followed by."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.captioning.model import Captioner
from modicum.errors import UsageError
from modicum.train.captions.data import PADDING, CaptionRows
from modicum.train.video.judge import Judge

# Captions scored together: what they take is little beside the clips.
CAPTIONS_AT_ONCE = 256


class CaptionFigures:
    """What held-out videos say of a captioner.

    loss: nats per token, over all captions of all videos. accuracy: the share of tokens that it finds most likely, given
    those before. n: videos. broken: those that could not be read, and why; they count nowhere.
    """

    def __init__(self, nats: float, right: int, tokens: int, n: int, broken: dict[str, str]) -> None:
        self.loss, self.accuracy = nats / max(1, tokens), right / max(1, tokens)
        self.tokens, self.n, self.broken = tokens, n, broken

    def words(self) -> str:
        return f"{self.loss:.4f} nats/token, {self.accuracy:.1%} of tokens right, {self.n:,} videos"

    def logged(self) -> list[float | None]:
        return [self.loss, self.accuracy]


class CaptionJudge(Judge):
    """Held-out videos, each looked at once, and their captions; processes share them out and know the sum.

    Args:
        rows: from captions to tokens. The others as for `Judge`.
    """

    measures = ("val_loss", "val_accuracy")

    def __init__(self, rows: CaptionRows, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.rows, self.measures = rows, CaptionJudge.measures

    def __call__(self, model: Any, *, bf16: bool) -> CaptionFigures:  # type: ignore[override]
        """Judge a model, whose mode is left as it was.

        Raises:
            UsageError: no video can be read.
        """
        training = model.training
        model.eval()
        sums, broken = torch.zeros(4, dtype=torch.float64), dict[str, str]()
        for group in self.groups(broken):
            videos = torch.cat([views for _, views in group])
            captions = [self.dataset.samples[index].captions for index, _ in group]
            sums += torch.tensor([*self._scored(model, videos, captions, bf16), len(group)], dtype=torch.float64)
        model.train(training)
        for others in self.processes.gathered(broken):
            broken |= others
        nats, right, tokens, n = self.processes.sum(sums).tolist()
        if not n:
            raise UsageError(
                f"none of the {len(self.dataset)} held-out videos can be read; the first: {next(iter(broken.values()))}"
            )
        return CaptionFigures(nats, int(right), int(tokens), int(n), broken)

    @torch.no_grad()
    def _scored(
        self, model: Captioner, videos: Tensor, captions: Sequence[Sequence[str]], bf16: bool
    ) -> tuple[float, int, int]:
        """Nats, tokens that are right, and tokens, of all captions of some clips; each clip is encoded once."""
        nats, right, tokens = 0.0, 0, 0
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            memory_BMD = model.encode(videos.to(model.device))
            about = [(place, text) for place, texts in enumerate(captions) for text in texts]
            for first in range(0, len(about), CAPTIONS_AT_ONCE):
                places, texts = zip(*about[first : first + CAPTIONS_AT_ONCE], strict=True)
                given_BL, targets_BL = (rows.to(model.device) for rows in self.rows(texts))
                logits_BLV = model(memory_BMD[list(places)], given_BL).float()
                real_BL = targets_BL != PADDING
                nats += F.cross_entropy(logits_BLV[real_BL], targets_BL[real_BL], reduction="sum").item()
                right += int((logits_BLV.argmax(-1) == targets_BL)[real_BL].sum())
                tokens += int(real_BL.sum())
        return nats, right, tokens
