"""Uptraining of captioners: the decoder's heads are shared, then it goes on learning to caption the clips it learned from.

The encoder stays as it is: nothing of it was converted, and drafts that share it go on fitting.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modicum import resources
from modicum.captioning.model import Captioner
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import read_checkpoint
from modicum.checkpoint.native import read_config
from modicum.checkpoint.record import QUALITY, Record
from modicum.classification.predict import Protocol, read_views
from modicum.config import CaptionerConfig
from modicum.errors import UsageError
from modicum.gqa.convert import CALIBRATED
from modicum.gqa.uptrain import Settings, Uptraining, budget
from modicum.parallel.data import Processes
from modicum.train.captions.data import CaptionRows, both_videos
from modicum.train.captions.judge import CaptionJudge
from modicum.train.captions.recipe import CaptionAugment
from modicum.train.captions.task import CaptionsTask
from modicum.train.onward import Outcome, schedule
from modicum.train.recipe import OptimSection
from modicum.train.video.shuffle import Augmentation
from modicum.video.loader import ClipLoader

# Where the original's training does not say.
BATCH, STRIDE, WORKERS = 16, 2, 2
# Clips that a conversion is calibrated on at least: each shows as many vectors as the decoder reads of it.
CALIBRATION_CLIPS = 64


def uptraining(source: str, destination: Path, settings: Settings) -> Uptraining:
    """The uptraining that fits the source: of a text model, or of a captioner.

    Raises:
        UsageError, CheckpointError: as `Uptraining`.
    """
    checkpoint = read_checkpoint(resources.model_presets().get(source) or resolve(source))
    captioner = isinstance(read_config(checkpoint.config), CaptionerConfig)
    return (CaptionUptraining if captioner else Uptraining)(source, destination, settings)


class CaptionUptraining(Uptraining):
    """As `Uptraining`, on captioned videos: tokens are those of captions, clips are looked at as in the original training.

    `data` is one folder, or its annotations in the layout of MSR-VTT or VATEX; `held_out` a split's name, or VATEX's other
    file.

    Raises:
        UsageError: settings that cannot be honoured, a captioner without an encoder of its own or without a tokenizer.
        CheckpointError: the source cannot be read.
    """

    def _plan(self) -> OptimSection:
        s = self.settings
        if self.config.shares_encoder is not None:
            raise UsageError(
                f"{self.source} is a draft without an encoder of its own: uptrain its target, and train the draft anew"
            )
        if len(s.data) != 1:
            raise UsageError(f"{len(s.data)} sources of clips were given: give one folder, or its annotations")
        for name in ("calibration", "window"):
            if getattr(s, name) is not None:
                raise UsageError(f"`{name}` is about text, and a captioner learns from clips: leave it out")
        if isinstance(s.held_out, float):
            raise UsageError(f"`held_out` is {s.held_out}: of clips name the split, or of VATEX the other file")
        self.training, self.held_out = both_videos(s.data[0], s.held_out)
        most = self.record.section("decoder").get("max_tokens", self.config.max_seq_len - 1)
        self.rows = CaptionRows(self.tokenizer, self.config.decoder_start_id, min(most, self.config.max_seq_len - 1))
        self.mean_length = self.rows.mean_length(self.training)
        # A batch counts all parts together here; the parts are what memory took then.
        original = {name: x for name, x in self.record.section("optim").items() if name != "accumulate"}
        self.smoothing = original.get("label_smoothing", 0.0)
        batch = s.batch or original.get("batch", BATCH)
        of_all = Record({"tokens": self._original_tokens})
        return schedule(
            budget(s, of_all, self.source), batch=batch, window=self.mean_length, lr=s.lr, original=original
        )

    @property
    def _original_tokens(self) -> int | None:
        clips = self.record.values.get("clips")
        return round(clips * self.mean_length) if isinstance(clips, int) else None

    @property
    def facts(self) -> dict[str, Any]:
        """What `go` does, as numbers and names."""
        s, optim = self.settings, self.optim
        return {
            "source": self.source,
            "destination": str(self.destination),
            "control": s.control,
            "method": None if s.control else s.method,
            "kv_heads": [self.config.n_kv_heads, self.kv_heads],
            "original_tokens": s.original_tokens or self._original_tokens,
            "tokens": round(optim.steps * optim.batch * self.mean_length),
            "clips": optim.steps * optim.batch,
            "steps": optim.steps,
            "teacher": s.teacher,
            "settings": {
                "teacher_weight": s.teacher_weight if s.teacher else None,
                "data": {"source": s.data, "held_out": s.held_out},
                "optim": optim.to_dict(),
                "seed": s.seed,
            },
        }

    def _lines(self) -> Iterator[tuple[str, str]]:
        s, optim, facts = self.settings, self.optim, self.facts
        before, after = facts["kv_heads"]
        by = f"{s.method}, calibrated on training clips" if s.method in CALIBRATED else s.method
        shared = ": the control" if s.control else f" -> {after} by {by}, in self- and cross-attention"
        yield "source", f"{self.source}, {before} key-value heads{shared}"
        yield "data", f"{len(self.training):,} captioned videos, {self.training.name}"
        yield "held out", f"{len(self.held_out):,} videos"
        tokens, original = facts["tokens"], facts["original_tokens"]
        share = "" if original is None else f", {tokens / original:.2%} of the original's"
        yield "steps", f"{optim.steps} of {optim.batch} clips: {facts['clips']:,} clips, {tokens:,} tokens{share}"
        yield (
            "rate",
            f"{optim.lr:.2e} after {optim.warmup} steps of warm-up, {optim.optimizer}; the encoder stays as it is",
        )
        if s.teacher is not None:
            yield "teacher", f"{s.teacher}, {s.teacher_weight:.0%} of the loss"
        yield "writes to", f"{self.destination}; until then the run is in {self.folder}"

    def _prepared(self, model: Captioner) -> Captioner:
        return model.freeze_encoder()

    def _task(self, original: Captioner) -> CaptionsTask:
        config, clips, s = self.config.encoder, self.record.section("clips"), self.settings
        stride, fps = clips.get("stride", STRIDE), clips.get("fps", 25.0) or None
        workers = self.record.section("data").get("workers", WORKERS)
        given = self.record.section("augment")
        augment = CaptionAugment.from_dict(given) if given else None
        short_side = None if augment is None else augment.short_side
        self.protocol = Protocol(views=(1, 1), stride=stride, fps=fps, short_side=short_side)
        loader = ClipLoader(
            self.training,
            num_frames=config.num_frames,
            stride=stride,
            fps=fps,
            size=config.image_size,
            augment=None if augment is None else Augmentation(augment, config.image_size),
            batch=self.optim.batch,
            seed=s.seed,
            workers=workers,
            short_side=short_side,
        )
        processes = Processes(device=original.device)
        judge = CaptionJudge(
            self.rows,
            self.held_out,
            config,
            self.protocol,
            workers=workers,
            batch=self.optim.batch,
            processes=processes,
        )
        teacher = self._teacher(original)
        if teacher is not None and teacher.encoder_fingerprint != original.encoder_fingerprint:
            raise UsageError(f"teacher {s.teacher} has another encoder than {self.source}: give one that sees alike")
        return CaptionsTask(
            loader,
            judge,
            self.rows,
            processes,
            seed=s.seed,
            smoothing=self.smoothing,
            teacher=teacher,
            weight=s.teacher_weight,
        )

    def _calibration(self, task: CaptionsTask) -> list[Any]:
        """Clips spread evenly over the training set, with their captions: as many tokens as a text model gets."""
        samples = self.training.samples
        count = max(CALIBRATION_CLIPS, math.ceil(10 * self.config.dim / self.mean_length))
        chosen = range(0, len(samples), max(1, len(samples) // count))
        return [
            (read_views(samples[at], self.config.encoder, self.protocol)[0], samples[at].captions[0]) for at in chosen
        ]

    def _recorded(self, outcome: Outcome) -> dict[str, Any]:
        # How good its captions are, and its draft, is another model's.
        kept = {name: value for name, value in self.record.values.items() if name not in QUALITY}
        return {**kept, "val_loss": outcome.after}

    def _export(self, model: Captioner, outcome: Outcome, force: bool) -> dict[str, Any]:
        facts = super()._export(model, outcome, force)
        per_clip = [numbers * model.config.memory_slots for numbers in facts["kv_bytes_per_token"]]
        return facts | {"context_bytes_per_clip": per_clip}
