"""`modicum train` on a captioner's recipe: from captioned videos to a folder for `modicum caption`, or its draft's."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend

from modicum import api
from modicum.captioning.metrics import bleu4
from modicum.captioning.model import Captioner
from modicum.captioning.scores import CaptionScores
from modicum.checkpoint.record import RECORD
from modicum.classification.predict import Protocol
from modicum.errors import UsageError
from modicum.parallel.data import Processes, joined
from modicum.train.captions.build import NO_CLASSES, fresh_captioner
from modicum.train.captions.data import SYNTHETIC, CaptionRows, caption_tokenizer, read_captioned, write_synthetic
from modicum.train.captions.describe import describe
from modicum.train.captions.evaluate import Written, evaluate_captions, scores_table
from modicum.train.captions.judge import CaptionFigures, CaptionJudge
from modicum.train.captions.recipe import CaptionRecipe
from modicum.train.captions.task import CaptionsTask
from modicum.train.loop import Training, check_fresh, console, heard_from
from modicum.train.state import Progress
from modicum.train.tokenizer import tokenizer_files
from modicum.train.video.run import LISTED, loader_of, report_missing, training_of
from modicum.train.video.shuffle import Augmentation
from modicum.video.datasets import VideoDataset
from modicum.video.loader import ClipLoader
from modicum.video.pixels import import_av

CAPTIONS = "captions.jsonl"


class CaptionTraining:
    """A captioner's recipe, checked as far as it can be without its videos.

    Args:
        expected: what the recipe's header says of the captions to expect.

    Raises:
        UsageError: a model that cannot be built.
        MissingExtraError: PyAV or sacrebleu is not installed.
    """

    def __init__(self, recipe: CaptionRecipe, name: str, expected: str | None = None) -> None:
        self.recipe, self.name, self.expected = recipe, name, expected
        self.folder = Path(recipe.run.folder)
        encoder, decoder = recipe.encoder, recipe.decoder
        if encoder is not None and not encoder.whole:
            encoder.config(recipe.clips, NO_CLASSES)
        if decoder.start is None:
            decoder.config(decoder.vocab_size)
        import_av()
        bleu4(["a"], [["a"]])  # rather missed now than when everything is trained

    def describe(self) -> None:
        """Print what a run would do."""
        with joined(self.recipe.run.device) as processes, heard_from(processes):
            describe(self.recipe, self.folder, processes, self.expected)

    def go(self, resume: bool) -> Path | None:
        """Train to the end, or until interrupted: the folder of the model, or None.

        Raises:
            UsageError: data that cannot be used, a batch that cannot be shared out, or another run's folder.
        """
        check_fresh(self.folder, resume)
        with joined(self.recipe.run.device) as processes, heard_from(processes):
            self.recipe.optim.micro_batch(processes.world)
            training, held_out = self._videos(processes)
            self.folder.mkdir(parents=True, exist_ok=True)
            report_missing(training, held_out)
            target = self._target(processes)
            model = self._model(training, target, processes, resume)
            run = self._training(model, target, training, held_out, processes)
            result = run.go(resume)
            self._report_broken(run.task.loader)
            if result is None:
                return None
            return self._finish(run, target, *result)

    def _videos(self, processes: Processes) -> tuple[VideoDataset, VideoDataset]:
        if self.recipe.data.format == SYNTHETIC:
            if processes.first:
                write_synthetic(self.recipe.data)
            processes.wait()
        return read_captioned(self.recipe.data)

    def _target(self, processes: Processes) -> Captioner | None:
        if self.recipe.draft is None:
            return None
        target = api.check_captioner(api.load(self.recipe.draft.target, device=processes.device, dtype="float32"))
        config, clips = target.config.encoder, self.recipe.clips
        if (config.num_frames, config.image_size) != (clips.num_frames, clips.shape):
            raise UsageError(
                f"the target reads {config.num_frames} frames of {'x'.join(map(str, config.image_size))} and the recipe has "
                f"{clips.num_frames} of {'x'.join(map(str, clips.shape))}: set `clips` to the target's"
            )
        return target.requires_grad_(False)

    def _model(self, training: VideoDataset, target: Captioner | None, processes: Processes, resume: bool) -> Captioner:
        if target is not None:
            files = {name: content for name, content in (target.files or {}).items() if name != RECORD}
        elif self.recipe.decoder.start is None:
            files = self._tokenizer(training, processes, resume)
        else:
            files = {}
        return fresh_captioner(self.recipe, files, target).to(processes.device)

    def _tokenizer(self, training: VideoDataset, processes: Processes, resume: bool) -> dict[str, bytes]:
        """Trained by the first process, and read by all."""
        section, own = self.recipe.decoder, self.folder / "tokenizer.json"
        # One left over from another recipe is never taken for this one's.
        if processes.first and not (resume and own.exists()):
            partial = own.with_name("tokenizer.partial.json")
            partial.write_bytes(caption_tokenizer(training, section.vocab_size, section.max_seq_len)["tokenizer.json"])
            partial.replace(own)
        processes.wait()
        return tokenizer_files(Backend.from_file(str(own)), section.max_seq_len)

    def _training(
        self,
        model: Captioner,
        target: Captioner | None,
        training: VideoDataset,
        held_out: VideoDataset,
        processes: Processes,
    ) -> Training:
        recipe = self.recipe
        optim, augment = recipe.optim, recipe.augment
        augmentation = None if augment is None else Augmentation(augment, recipe.clips.shape)
        loader = loader_of(recipe, training, augmentation, self._short_side, processes)
        rows = CaptionRows(model.tokenizer, model.config.decoder_start_id, self._max_tokens(model))
        judge = CaptionJudge(
            rows,
            held_out,
            model.config.encoder,
            self._protocol,
            workers=recipe.data.workers,
            batch=optim.micro_batch(processes.world),
            processes=processes,
        )
        task = CaptionsTask(
            loader,
            judge,
            rows,
            processes,
            seed=recipe.run.seed,
            smoothing=optim.label_smoothing,
            teacher=target,
            weight=0.0 if recipe.draft is None else recipe.draft.weight,
        )
        return training_of(recipe, self.name, model, task, self._settings())

    def _max_tokens(self, model: Captioner) -> int:
        """What a caption may have beside the start token, which stands in the decoder's context too."""
        return min(self.recipe.decoder.max_tokens, model.config.max_seq_len - 1)

    @property
    def _short_side(self) -> int | None:
        return None if self.recipe.augment is None else self.recipe.augment.short_side

    @property
    def _protocol(self) -> Protocol:
        clips = self.recipe.clips
        return Protocol(views=(1, 1), stride=clips.stride, fps=clips.clock, short_side=self._short_side)

    def _settings(self) -> dict[str, Any]:
        """What makes the run what it is. How many decode, and where files lie, changes nothing."""
        values = self.recipe.to_dict()
        for name in ("annotations", "root", "held_out_annotations", "held_out_root", "workers", "prefetch"):
            values["data"].pop(name)
        values["optim"].pop("accumulate")
        return values

    def _report_broken(self, loader: ClipLoader) -> None:
        report = loader.report(LISTED)
        if report is not None:
            console.print(report, soft_wrap=True, markup=False, highlight=False)

    def _finish(self, run: Training, target: Captioner | None, progress: Progress, figures: CaptionFigures) -> Path:
        """Have the model write about what was held out, in the form in which it is saved; then save it."""
        recipe, processes, task = self.recipe, run.processes, run.task
        model: Captioner = run.judged_model.to(getattr(torch, recipe.decoder.save_dtype))
        if target is not None:
            model.share(target)
        said = [caption for sample in task.loader.dataset.samples for caption in sample.captions]

        def written(control: Any = None, by: Captioner = model, draft: Any = None) -> Written:
            return evaluate_captions(
                by,
                task.judge.dataset,
                self._protocol,
                control=control,
                training=said,
                draft=draft,
                workers=recipe.data.workers,
                batch=task.judge.batch,
                seed=recipe.run.seed,
                processes=processes,
            )

        own = written()
        scores = {"": own.scores} | {name: written(name).scores for name in ("shuffled", "blank")}
        record = self._record(run, progress, figures, own, scores)
        if target is not None:
            stats = written(by=target, draft=model).stats
            record |= {
                "tokens_per_target_call": stats.tokens_per_target_call,
                "acceptance_rate": stats.acceptance_rate,
            }
        goal = self.folder / "model"
        if not processes.first:
            return goal
        write_captions(self.folder / CAPTIONS, own)
        model.files = {**(model.files or {}), RECORD: json.dumps(record, indent=2).encode()}
        api.save(model.to("cpu"), goal, overwrite=True)
        console.print(scores_table(scores))
        for reason in list(own.broken.values())[:LISTED]:
            console.print(f"  not judged: {reason}", soft_wrap=True, markup=False, highlight=False)
        if target is not None:
            calls = record["tokens_per_target_call"]
            console.print(f"as a draft of its target: {calls:.2f} tokens per target call", highlight=False)
        console.print(f"held out: {figures.words()}; model in {goal}", soft_wrap=True)
        return goal

    def _record(
        self, run: Training, progress: Progress, figures: CaptionFigures, own: Written, scores: dict[str, CaptionScores]
    ) -> dict[str, Any]:
        dataset: VideoDataset = run.task.loader.dataset
        return {
            "recipe": self.name,
            "steps": progress.step,
            "epochs": self.recipe.optim.epochs,
            "clips": progress.seen,
            "seconds": round(progress.seconds),
            "processes": run.processes.world,
            "val_loss": figures.loss,
            "val_accuracy": figures.accuracy,
            "captions": scores[""].to_dict(),
            "controls": {name: given.to_dict() for name, given in scores.items() if name},
            "videos": {"train": len(dataset), "held_out": figures.n},
            "broken": {"train": len(run.task.loader.broken), "held_out": len(own.broken)},
            "settings": self.recipe.to_dict(),
        }


def write_captions(path: Path, written: Written) -> None:
    """A line of JSON for each held-out video: what was written, and what it was compared with."""
    rows = zip(written.ids, written.captions, written.references, strict=True)
    lines = [json.dumps({"id": id, "caption": text, "references": true}, ensure_ascii=False) for id, text, true in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
