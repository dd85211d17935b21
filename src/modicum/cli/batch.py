"""A file of prompts: results are kept as they come, and an interrupted run goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modicum.errors import UsageError

# Prompts per call: enough to fill a batch, few enough that little is lost when the machine goes down.
CHUNK = 64


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
        header, *results = self.partial.read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(header).get("fingerprint") != self.fingerprint:
            raise UsageError(
                f"{self.partial} was begun with other prompts or settings: finish it with those, or delete it"
            )
        # The last line may have been cut in the middle of being written.
        whole = [json.loads(line) for line in results if line.endswith("\n")]
        return {result["line"]: result["result"] for result in whole}

    @property
    def open_lines(self) -> list[int]:
        return [number for number in range(len(self.lines)) if number not in self.done]

    def begin(self) -> Any:
        """The partial file, open for more results."""
        if not self.done:
            self.partial.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
        else:
            kept = [json.dumps({"line": n, "result": r}) for n, r in self.done.items()]
            text = "\n".join([json.dumps({"fingerprint": self.fingerprint}), *kept]) + "\n"
            self.partial.write_text(text, encoding="utf-8")
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
        UsageError: no such file, or a line that is not {"prompt": text} or {"tokens": [ids]}.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a JSONL file of prompts") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON ({error}): repair it") from error
        if not isinstance(value, dict) or ("prompt" in value) == ("tokens" in value):
            raise UsageError(f'{path} line {number} needs either "prompt": TEXT or "tokens": [IDS]')
        lines.append(value)
    return lines


def run(job: Job, load: Callable[[], tuple[Any, Any]], settings: dict[str, Any], seed: int | None) -> None:
    """Generate what is open, chunk by chunk, and write the file when all of it is there."""
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api

    if job.open_lines:
        target, draft = load()
        keys = api.stream_keys(seed, len(job.lines))
        with Progress(console=Console(stderr=True)) as bar, job.begin() as file:
            task = bar.add_task("prompts", total=len(job.lines), completed=len(job.done))
            todo = job.open_lines
            try:
                for start in range(0, len(todo), CHUNK):
                    numbers = todo[start : start + CHUNK]
                    prompts: Any = [job.lines[n].get("prompt", job.lines[n].get("tokens")) for n in numbers]
                    # A list of seeds gives every prompt the stream of its line, whatever chunk it falls in.
                    out = api.generate(target, prompts, draft=draft, seed=[keys[n] for n in numbers], **settings)
                    for at, number in enumerate(numbers):
                        job.done[number] = result_line(job.lines[number], out, at)
                        file.write(json.dumps({"line": number, "result": job.done[number]}) + "\n")
                    file.flush()
                    bar.update(task, completed=len(job.done))
            except KeyboardInterrupt:
                file.flush()
                raise UsageError(
                    f"interrupted with {len(job.done)} of {len(job.lines)} prompts done, which are kept in {job.partial}: "
                    "run the same command again to go on"
                ) from None
    job.finish()


def result_line(line: dict[str, Any], out: Any, at: int) -> dict[str, Any]:
    """A prompt's line with its result; token ids that were the prompt move to "prompt_tokens"."""
    given = {"prompt_tokens" if key == "tokens" else key: value for key, value in line.items()}
    return {
        **given,
        "text": None if out.texts is None else out.texts[at],
        "tokens": out.tokens[at],
        "finish_reason": out.finish_reasons[at],
        "stats": out.row_stats[at].to_dict(),
    }
