"""What a captioner is trained on: clips in numbered batches, and what is said of them (teacher forcing)."""

import hashlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.captioning.model import Captioner
from modicum.lm.objective import draw_by
from modicum.parallel.data import Processes
from modicum.train.captions.data import PADDING, CaptionRows
from modicum.train.captions.judge import CaptionJudge
from modicum.train.task import digest
from modicum.train.video.task import ClipsWork, samples_digest
from modicum.video.datasets import VideoDataset
from modicum.video.loader import ClipLoader


class CaptionsTask(ClipsWork):
    """A captioned data set, for the loop.

    The loss is in nats per token, of so many tokens as captions have on average: every token of every clip weighs the same,
    however a batch is split over processes and parts, so that they make the update that one process would.

    Args:
        loader, judge: as in `ClipsWork`.
        rows: from captions to tokens.
        smoothing: label smoothing.
        teacher: a captioner with the same tokens, to learn from with `weight` of the loss; it reads what the model encodes.
    """

    def __init__(
        self,
        loader: ClipLoader,
        judge: CaptionJudge,
        rows: CaptionRows,
        processes: Processes,
        *,
        seed: int,
        smoothing: float = 0.0,
        teacher: Captioner | None = None,
        weight: float = 0.0,
    ) -> None:
        super().__init__(loader, judge, processes, seed)
        self.rows, self.smoothing, self.teacher, self.weight = rows, smoothing, teacher, weight
        self.mean_length = rows.mean_length(loader.dataset)

    def loss(self, model: Captioner, number: int) -> Tensor:
        """Of batch `number` of this process."""
        clips = self.clips(number)
        draw_by((self.seed, number, self.processes.rank))
        captions = [caption or "" for caption in clips.captions]
        given_BL, targets_BL = (rows.to(model.device, non_blocking=True) for rows in self.rows(captions))
        memory_BMD = self.memory(model, clips.video.to(model.device, non_blocking=True))
        logits_BLV = model(memory_BMD, given_BL).float()
        nats = F.cross_entropy(
            logits_BLV.flatten(0, 1),
            targets_BL.flatten(),
            ignore_index=PADDING,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        if self.teacher is not None and self.weight:
            with torch.no_grad():
                wanted_BLV = self.teacher(memory_BMD, given_BL).float().log_softmax(-1)
            distance_BL = F.kl_div(logits_BLV.log_softmax(-1), wanted_BLV, reduction="none", log_target=True).sum(-1)
            nats = self.weight * distance_BL[targets_BL != PADDING].sum() + (1 - self.weight) * nats
        return nats / (len(captions) * self.mean_length)

    def memory(self, model: Captioner, video: Tensor) -> Tensor:
        """What the encoder makes of clips; without a graph where it is not trained."""
        trained = model.encoder is not None and not model.encoder_frozen
        with torch.set_grad_enabled(trained):
            return model.encode(video)

    def identity(self) -> dict[str, Any]:
        """The samples and captions themselves, and the teacher: others would make another run of it."""
        datasets = {"clips": self.loader.dataset, "held_out": self.judge.dataset}
        taught = None if self.teacher is None else (digest(self.teacher), self.weight)
        return {name: captions_digest(dataset) for name, dataset in datasets.items()} | {"teacher": taught}


def captions_digest(dataset: VideoDataset) -> str:
    """A hash of which videos there are and what is said of them."""
    said = [sample.captions for sample in dataset.samples]
    return hashlib.sha256(json.dumps([samples_digest(dataset), said]).encode()).hexdigest()
