"""A file of prompts: results are kept as they come, and an interrupted run goes on where it stopped."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modicum.errors import ModicumError, UsageError

# Prompts per call: enough to fill a batch, few enough that little is lost when the machine goes down.
CHUNK = 64


class Interrupted(ModicumError):
    """Ctrl-C in the middle of a batch: its sentence says what was kept."""

    exit_code = 130


class Job:
    """What is asked, and what is done already: results live beside OUT in `OUT.partial` until all are there."""

    def __init__(self, prompts: Path, out: Path, settings: dict[str, Any]) -> None:
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.lines = read_prompts(prompts)
        identity = json.dumps([settings, self.lines], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.done = self._read_partial()

    def _read_partial(self) -> dict[int, dict[str, Any]]:
        if not self.partial.exists():
            return {}
        # The last line may have been cut in the middle of being written, even the first and only one.
        whole = [line for line in self.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        if whole and whole[0].rstrip() != self._header().encode():
            raise UsageError(
                f"{self.partial} was begun with other prompts or settings: finish it with those, or delete it"
            )
        results = [json.loads(line) for line in whole[1:]]
        return {result["line"]: result["result"] for result in results}

    def _header(self) -> str:
        return json.dumps({"fingerprint": self.fingerprint})

    @property
    def open_lines(self) -> list[int]:
        return [number for number in range(len(self.lines)) if number not in self.done]

    def begin(self) -> Any:
        """The partial file, open for more results."""
        kept = [json.dumps({"line": n, "result": r}) for n, r in self.done.items()]
        # Replaced, not rewritten: what an earlier run has finished must survive whatever stops this one.
        fresh = self.partial.with_name(self.partial.name + ".new")
        fresh.write_text("\n".join([self._header(), *kept]) + "\n", encoding="utf-8")
        os.replace(fresh, self.partial)
        return self.partial.open("a", encoding="utf-8")

    def finish(self) -> None:
        """Put the results where they belong, in the order of the prompts."""
        goal = self.out.with_name(self.out.name + ".complete")
        with goal.open("w", encoding="utf-8") as file:
            for number in range(len(self.lines)):
                file.write(json.dumps(self.done[number], ensure_ascii=False) + "\n")
        os.replace(goal, self.out)
        self.partial.unlink()


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, each checked.

    Raises:
        UsageError: no prompts in it, or a line that is not {"prompt": text} or {"tokens": [ids]}.
    """
    lines = []
    for number, line in numbered_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON ({error}): repair it") from error
        if not isinstance(value, dict) or ("prompt" in value) == ("tokens" in value):
            raise UsageError(f'{path} line {number} needs either "prompt": TEXT or "tokens": [IDS]')
        if not is_text(value.get("prompt")) and not is_ids(value.get("tokens")):
            raise UsageError(
                f'{path} line {number} must have a text in "prompt" or a list of ids in "tokens", not empty'
            )
        lines.append(value)
    return lines


def read_texts(path: Path) -> list[Any]:
    """Prompts, texts or lists of ids: of a .jsonl file as above, of any other the lines themselves."""
    if path.suffix == ".jsonl":
        return [line.get("prompt", line.get("tokens")) for line in read_prompts(path)]
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    Raises:
        UsageError: no such file, one that is not UTF-8, or one without lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a file of prompts") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UsageError(f"{path} has no prompts: give at least one line")
    return lines


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(item) is int for item in value)


def run(job: Job, load: Callable[[], tuple[Any, Any]], settings: dict[str, Any], seed: int | None) -> None:
    """Generate what is open, chunk by chunk, and write the file when all of it is there."""
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.decode.prompts import encode_prompts, limit_of

    if job.open_lines:
        target, draft = load()
        # Every prompt is checked before the first is run, or a long job would be refused near its end.
        prompts = encode_prompts(target, [line.get("prompt", line.get("tokens")) for line in job.lines])
        for number, ids in enumerate(prompts):
            limit_of(target, number, ids, settings["max_new_tokens"])
        base = secrets.randbits(63) if seed is None else seed
        with Progress(console=Console(stderr=True)) as bar, job.begin() as file:
            task = bar.add_task("prompts", total=len(job.lines), completed=len(job.done))
            todo = job.open_lines
            try:
                for start in range(0, len(todo), CHUNK):
                    numbers = todo[start : start + CHUNK]
                    chunk = [prompts[n] for n in numbers]
                    # A list of seeds gives every prompt the stream of its line, whatever chunk it falls in.
                    out = api.generate(target, chunk, draft=draft, seed=[(base, n) for n in numbers], **settings)
                    for at, number in enumerate(numbers):
                        job.done[number] = result_line(job.lines[number], out, at)
                        file.write(json.dumps({"line": number, "result": job.done[number]}) + "\n")
                    file.flush()
                    bar.update(task, completed=len(job.done))
            except KeyboardInterrupt:
                file.flush()
                raise Interrupted(
                    f"interrupted with {len(job.done)} of {len(job.lines)} prompts done, which are kept in {job.partial}: "
                    "run the same command again to go on"
                ) from None
    job.finish()


def result_line(line: dict[str, Any], out: Any, at: int) -> dict[str, Any]:
    """A prompt's line with its result; token ids that were the prompt move to "prompt_tokens"."""
    given = {"prompt_tokens" if key == "tokens" else key: value for key, value in line.items()}
    scored = {} if out.logprobs is None else {"logprobs": [logprob.to_dict() for logprob in out.logprobs[at]]}
    return {
        **given,
        "text": None if out.texts is None else out.texts[at],
        "tokens": out.tokens[at],
        "finish_reason": out.finish_reasons[at],
        **scored,
        "stats": out.row_stats[at].to_dict(),
    }
