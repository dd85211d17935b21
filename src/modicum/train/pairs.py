"""Pairs of an input and the target to write about it: JSON lines, padded batches, and a loss on the targets alone."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.lm.objective import draw_by
from modicum.train.loop import console
from modicum.train.task import TextFigures, TextWork

IGNORED = -100
LINES_AT_ONCE = 1024


class Example(NamedTuple):
    """Token ids. The end-of-text token closes the target, and the input too where the tokenizer of a T5 puts it there."""

    input: list[int]
    target: list[int]


@dataclass(frozen=True)
class Pairs:
    """The examples of a file, and of how many the input and the target were cut."""

    examples: list[Example]
    cut_inputs: int
    cut_targets: int


def read_pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, input and target of every line {"input": text, "target": text}; other keys are not looked at.

    Raises:
        UsageError: no such file, or a line that is something else.
    """
    if not path.is_file():
        raise UsageError(f'{path} does not exist: give a file of lines {{"input": text, "target": text}}')
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            match value:
                case {"input": str(given), "target": str(wanted)}:
                    yield number, given, wanted
                case _:
                    raise UsageError(
                        f'{path}, line {number}: write {{"input": text, "target": text}}, on one line of JSON'
                    )


def encode_pairs(path: Path, tokenizer: Tokenizer, max_input: int, max_target: int, *, continued: bool) -> Pairs:
    """The examples of a file, in its order; what is too long loses its end, but not the token that closes it.

    Args:
        max_input, max_target: tokens, special ones included.
        continued: the target goes on where the input stops, as a decoder reads them.

    Raises:
        UsageError: as `read_pairs`; a file without lines; an input without tokens, which nothing can go on from.
    """
    # Where there are several, the plain end of a text comes before those of conversations.
    end, encode = min(tokenizer.eos_ids), tokenizer.backend.encode_batch
    lines = list(read_pairs(path))
    if not lines:
        raise UsageError(f'{path} is empty: give a file of lines {{"input": text, "target": text}}')
    examples, cut_inputs, cut_targets = [], 0, 0
    pieces = [lines[start : start + LINES_AT_ONCE] for start in range(0, len(lines), LINES_AT_ONCE)]
    silent = not sys.stderr.isatty()
    for piece in track(pieces, path.name, console=console, transient=True, disable=silent):
        inputs = encode([text for _, text, _ in piece])
        targets = encode([text for _, _, text in piece], add_special_tokens=False)
        for (number, *_), read, written in zip(piece, inputs, targets, strict=True):
            # A template's end of text would tell a decoder that there is nothing to go on with.
            given = read.ids[:-1] if continued and read.ids[-1:] == [end] else read.ids
            if not given:
                raise UsageError(f"{path}, line {number}: the input has no tokens: give one that is not empty")
            wanted = [*written.ids, end]
            examples.append(Example(cut(given, max_input, end), cut(wanted, max_target, end)))
            cut_inputs += len(given) > max_input
            cut_targets += len(wanted) > max_target
    return Pairs(examples, cut_inputs, cut_targets)


def cut(ids: list[int], limit: int, end: int) -> list[int]:
    """At most `limit` ids, closed as they were."""
    if len(ids) <= limit:
        return ids
    return [*ids[: limit - 1], end] if ids[-1] == end else ids[:limit]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of ids as int64 [B, the longest], what is missing at their ends filled with `value`."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def separate(examples: list[Example], start: int) -> tuple[dict[str, Tensor], Tensor]:
    """What an `EncoderDecoder` is called with, and the tokens that its logits are for, `IGNORED` where there are none.

    Args:
        start: what the decoder reads before the first token of the target.
    """
    lengths_B = torch.tensor([len(example.input) for example in examples])
    read_BL = padded([[start, *example.target[:-1]] for example in examples], start)
    given = {"source": padded([example.input for example in examples], start), "ids_BL": read_BL}
    return {**given, "lengths_B": lengths_B}, padded([example.target for example in examples], IGNORED)


def continued(examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """The same for a `Decoder`: input and target in one row, of which it is to predict the target."""
    # No token sees those after it, so that any id will do as padding at the end.
    given = {"ids_BL": padded([[*example.input, *example.target[:-1]] for example in examples], 0)}
    return given, padded([[IGNORED] * (len(example.input) - 1) + example.target for example in examples], IGNORED)


class PairsTask(TextWork):
    """Examples in numbered batches, in an order that is a pure function of (seed, number); every pass has another.

    Args:
        start: as in `separate`; None for a decoder.
        batch: examples that are in memory together.
        accumulate: batches that make one step.
    """

    def __init__(
        self,
        training: list[Example],
        held_out: list[Example],
        *,
        start: int | None,
        batch: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.training, self.judged, self.start = training, held_out, start
        self.batch, self.accumulate, self.seed = batch, accumulate, seed
        lengths = [len(example.input) + len(example.target) for example in training]
        # Of an average batch, padding not counted.
        self.per_batch = round(batch * sum(lengths) / len(lengths))

    def examples(self, number: int) -> list[Example]:
        """Those of batch `number`."""
        places = range(number * self.batch, (number + 1) * self.batch)
        return [self.training[self._index(place)] for place in places]

    def _index(self, place: int) -> int:
        turn, rest = divmod(place, len(self.training))
        if getattr(self, "_turn", None) != turn:
            self._turn, self._order = turn, np.random.default_rng((self.seed, turn)).permutation(len(self.training))
        return int(self._order[rest])

    def loss(self, model: Any, number: int) -> Tensor:
        """The share of batch `number` in its step's mean nats per target token, times `accumulate`.

        The mean is over the tokens of the whole step: how it is split into batches changes nothing.
        """
        first = number - number % self.accumulate
        step = [example for part in range(self.accumulate) for example in self.examples(first + part)]
        n_tokens = sum(len(example.target) for example in step)
        draw_by((self.seed, number))
        return self._nats(model, self.examples(number)) * (self.accumulate / n_tokens)

    def _nats(self, model: Any, examples: list[Example]) -> Tensor:
        """Of all targets together."""
        given, targets_BL = continued(examples) if self.start is None else separate(examples, self.start)
        logits_BLV = model(**{name: tensor.to(model.device) for name, tensor in given.items()}).float()
        targets_N = targets_BL.to(model.device).flatten()
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_N, ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def quality(self, model: Any, *, bf16: bool) -> TextFigures:
        """Nats per token of the held-out targets, their ends included; no bits per byte, as some may be cut."""
        training = model.training
        model.eval()
        # Examples of like lengths together, so that little is padding.
        judged = sorted(self.judged, key=lambda example: (len(example.input), len(example.target)))
        batches = [judged[start : start + self.batch] for start in range(0, len(judged), self.batch)]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            nats = sum(self._nats(model, batch).item() for batch in batches)
        model.train(training)
        return TextFigures(nats / sum(len(example.target) for example in judged))

    def identity(self) -> dict[str, Any]:
        """The examples themselves, not their files' names: others would make another run of it."""
        hashes = [
            hashlib.sha256(json.dumps(examples).encode()).hexdigest() for examples in (self.training, self.judged)
        ]
        return {"pairs": hashes}
