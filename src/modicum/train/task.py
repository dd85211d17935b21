"""What a run trains on and is judged by: an objective, the tokens, and a teacher if there is one."""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.lm.objective import Objective
from modicum.train.text import Windows


class TextFigures(NamedTuple):
    """What held-out text says of a model: nats per token, and bits per byte where it is known of how many bytes it is."""

    loss: float
    bits_per_byte: float | None = None

    def words(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits/byte"
        return f"{self.loss:.4f} nats/token{bits}"

    def logged(self) -> list[float | None]:
        return [self.loss, self.bits_per_byte]


class TextWork:
    """What all work on text has in common for the loop: it counts tokens, and nothing has to be waited for."""

    unit = "tokens"
    measures = ("val_loss", "bits_per_byte")
    waited: float | None = None


class Task(TextWork):
    """An objective on a text, in numbered batches whose order a seed decides.

    Args:
        training, held_out: rows of token ids.
        held_out_bytes: of the text that `held_out` encodes, None if unknown.
        teacher: distil from it, with `teacher_weight` of the loss.
    """

    def __init__(
        self,
        objective: Objective,
        training: np.ndarray,
        held_out: np.ndarray,
        held_out_bytes: int | None,
        *,
        batch: int,
        seed: int,
        teacher: Any = None,
        teacher_weight: float = 0.0,
    ) -> None:
        self.objective, self.training, self.judged, self.judged_bytes = objective, training, held_out, held_out_bytes
        self.windows, self.seed = Windows(training, objective.window, batch, seed), seed
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.per_batch = batch * objective.window

    def loss(self, model: Any, number: int) -> Tensor:
        """Mean nats per token of batch `number`, which this alone decides: a resumed run meets the same batches."""
        tokens_BL = self.windows.at(number).to(model.device)
        return self.objective.loss(model, tokens_BL, (self.seed, number), self.teacher, self.teacher_weight)

    @torch.no_grad()
    def quality(self, model: Any, *, bf16: bool) -> TextFigures:
        """Of the held-out text, the end-of-text tokens included."""
        training = model.training
        model.eval()
        ids = torch.from_numpy(self.judged.astype("int64")).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            nats, n_tokens = self.objective.held_out(model, ids)
        model.train(training)
        bits = None if self.judged_bytes is None else nats / math.log(2) / self.judged_bytes
        return TextFigures(nats / n_tokens, bits)

    def identity(self) -> dict[str, Any]:
        """The tokens and the teacher themselves, not their files' names: others would make another run of it."""
        data = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in (self.training, self.judged)]
        taught = None if self.teacher is None else (digest(self.teacher), self.teacher_weight)
        return {"tokens": data, "window": self.objective.window, "teacher": taught}


def digest(model: torch.nn.Module) -> str:
    """A hash of a model's weights."""
    result = hashlib.sha256()
    for parameter in model.parameters():
        result.update(parameter.detach().cpu().numpy().tobytes())
    return result.hexdigest()


def teacher_trouble(teacher: Any, vocab_size: int, tokenizer: Tokenizer) -> str | None:
    """Why a teacher's predictions are not about a student's tokens; None when they are."""
    theirs = teacher.config.vocab_size
    if theirs != vocab_size:
        return f"{theirs} tokens against {vocab_size}"
    return None if teacher.tokenizer is None else teacher.tokenizer.difference(tokenizer)
