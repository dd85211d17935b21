"""Text on a CPU beside OpenVINO GenAI and llama.cpp: the same weights and prompt, greedy, batch 1, a fixed count of tokens.

    python benchmarks/text_peers.py --peer-python PATH           the reference pair: plain, with its draft, prompt lookup
    python benchmarks/text_peers.py --peer-python PATH --large   a random Llama of 0.2B: plain, and 8-bit weights
    python benchmarks/text_peers.py --out FILE.md                what is printed, in FILE.md as well

Every system lives in a process of its own: modicum under this Python, the others under --peer-python, since what they
need does not go together with what modicum is tested with. Every round asks each system once, in an order that
rotates, so that a slow minute of the machine meets all of them. Asked are 1 token, which takes as long as reading the
prompt, and then 1 + n tokens: a token's time is the difference over n. Figures are medians over the rounds.

The last column counts the first tokens that are those of modicum in float32; a system that in float32 does not agree in
the first tokens runs another model, and ends the run with an error. All settings are the systems' own defaults but for
the number of threads, OpenVINO's memory of prompts, which is off, and K and the longest n-gram, which are modicum's.
8 bits are OpenVINO's compression by channel and llama.cpp's Q8_0. A peer that is not installed is named as such.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

import modicum
from modicum import resources
from modicum.report.machine import machine

sys.path.append(str(Path(__file__).parents[1]))  # for when it is run by its path
from benchmarks.text_cpu import PROMPT, make_large

WORKER = Path(__file__).with_name("text_peers_worker.py")
MODICUM, OPENVINO, LLAMA = "modicum", "OpenVINO GenAI", "llama.cpp"
# What each can run. llama.cpp has drafts by a second model in its programs, but not in what its Python package holds.
PRECISIONS = {
    MODICUM: ("float32", "bfloat16"),
    OPENVINO: ("float32", "bfloat16", "int8"),
    LLAMA: ("float32", "bfloat16", "float16", "int8"),
}
MODES = {MODICUM: ("plain", "draft", "lookup"), OPENVINO: ("plain", "draft", "lookup"), LLAMA: ("plain", "lookup")}
INSTALL = {
    MODICUM: "pip install modicum",
    # The exporter brings a torchvision for CUDA, which a torch for the CPU cannot load and the export does without.
    OPENVINO: "pip install torch==2.13.0 optimum-intel openvino-genai && pip uninstall -y torchvision",
    LLAMA: "CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' pip install --no-binary llama-cpp-python "
    "llama-cpp-python gguf safetensors torch==2.13.0",
}
# In float32 rounding does not part two systems before this many tokens, and heads in a wrong order did after 4.
SURE_TOKENS = 16


@dataclass
class System:
    engine: str
    precision: str
    mode: str
    unmeasured: str = ""  # why
    tokens: list[int] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    process: Any = None
    errors: Any = None

    def __str__(self) -> str:
        return f"{self.engine} {self.precision} {self.mode}"

    def start(self, python: str, spec: dict[str, Any], stack: ExitStack) -> None:
        spec = {**spec, "engine": self.engine, "precision": self.precision, "mode": self.mode}
        self.errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        pipes = {"bufsize": 0, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        command = [python, str(WORKER), json.dumps(spec)]
        self.process = stack.enter_context(subprocess.Popen(command, **pipes, env=environment))
        answer = self.answer()
        if "missing" in answer:
            self.unmeasured = f"`{answer['missing']}` is not installed: `{INSTALL[self.engine]}`"

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or [f"ended with code {self.process.wait()}"]
        raise SystemExit(f"{self}: {said[-1]}")

    def ask(self, n_tokens: int) -> tuple[float, list[int]]:
        """Milliseconds, and the tokens."""
        with suppress(BrokenPipeError):  # `answer` says what it died of
            self.process.stdin.write(b"%d\n" % n_tokens)
        answer = self.answer()
        if len(answer["tokens"]) != n_tokens:
            raise SystemExit(f"{self}: asked for {n_tokens} tokens, it generated {len(answer['tokens'])}")
        return answer["seconds"] * 1e3, answer["tokens"]


def systems(precisions: list[str], modes: list[str]) -> list[System]:
    """All that exist, modicum in float32 first, whose tokens are what the others' are compared with."""
    first = System(MODICUM, "float32", "plain")
    wanted = [
        System(engine, precision, mode)
        for precision in precisions
        for mode in modes
        for engine in PRECISIONS
        if precision in PRECISIONS[engine] and mode in MODES[engine]
    ]
    return [first, *(system for system in wanted if str(system) != str(first))]


def not_offered(precisions: list[str], modes: list[str]) -> list[str]:
    """What was asked for and some engine does not have."""
    return [
        f"{engine} {asked}"
        for engine in PRECISIONS
        for asked in [*precisions, *modes]
        if asked not in (*PRECISIONS[engine], *MODES[engine])
    ]


def measure(running: list[System], n_tokens: int, rounds: int) -> None:
    for turn in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        at = turn % len(running)
        for system in running[at:] + running[:at]:
            first_ms, _ = system.ask(1)
            all_ms, system.tokens = system.ask(1 + n_tokens)
            if turn:  # the first round warms up
                system.first_ms.append(first_ms)
                system.token_ms.append((all_ms - first_ms) / n_tokens)


def agreeing(tokens: list[int], reference: list[int]) -> int:
    """How many first tokens are the same."""
    same = [a == b for a, b in zip(tokens, reference, strict=True)]
    return same.index(False) if False in same else len(same)


def check_model(running: list[System]) -> None:
    """Ends the run if a system in float32 parts from modicum so early that it must have other weights."""
    for system in running:
        n_same = agreeing(system.tokens, running[0].tokens)
        if system.precision == "float32" and n_same < min(SURE_TOKENS, len(system.tokens)):
            raise SystemExit(
                f"{system} runs another model than {running[0]}: the first {n_same} tokens agree, {SURE_TOKENS} must"
            )


def beside(system: System, running: list[System]) -> float | None:
    """Its time per token over that of modicum in the same mode and precision; narrower ones meet modicum's bfloat16."""
    precision = system.precision if system.precision in PRECISIONS[MODICUM] else "bfloat16"
    for ours in running:
        if (ours.engine, ours.precision, ours.mode) == (MODICUM, precision, system.mode):
            return statistics.median(system.token_ms) / statistics.median(ours.token_ms)
    return None


def table(running: list[System]) -> Iterator[str]:
    """Markdown lines."""
    yield "| decoding | precision | system | first token ms | ms/token | min | max | over modicum's | tokens as float32 |"
    yield "|---|---|---|" + "---:|" * 6
    for system in running:
        ratio = beside(system, running)
        median, lowest, highest = (find(system.token_ms) for find in (statistics.median, min, max))
        times = [f"{statistics.median(system.first_ms):.1f}", *(f"{ms:.3f}" for ms in (median, lowest, highest))]
        n_same = agreeing(system.tokens, running[0].tokens)
        compared = ["" if ratio is None else f"{ratio:.2f}", f"{n_same} of {len(system.tokens)}"]
        cells = [system.mode, system.precision, system.engine, *times, *compared]
        yield f"| {' | '.join(cells)} |"


def versions(python: str) -> str:
    """What is installed there, of what is measured."""
    names = ["torch", "openvino", "openvino-genai", "nncf", "llama-cpp-python"]
    code = (
        "import importlib.metadata as m, json, sys; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found = {name.replace("_", "-"): version for name, version in json.loads(said).items()}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found) or "none of them"


def report(options: argparse.Namespace, work: Path) -> Iterator[str]:
    """The markdown of a whole run, line by line."""
    if options.large:
        target, draft, prompt = work / "large", None, list(range(100, 140)) * 2
        make_large(target)
    else:
        presets = resources.model_presets()
        target, draft = (Path(presets.get(name, name)) for name in (options.target, options.draft))
        prompt = modicum.load(target, device="cpu").tokenizer.encode(PROMPT)
    spec = {"target": str(target), "draft": str(draft), "prompt": prompt, "work": str(work), "k": options.k}
    spec |= {"threads": options.threads, "max_tokens": 1 + options.tokens}
    yield f"# Text on a CPU beside other engines, {date.today()}"
    yield ""
    yield f"{machine()}; {options.threads} threads for each system."
    yield f"Peers: {versions(options.peer_python)}."
    yield f"A prompt of {len(prompt)} tokens, 1 + {options.tokens} new ones, K = {options.k}, {options.rounds} rounds."
    yield ""
    yield f"`python benchmarks/text_peers.py {shlex.join(options.command)}`"
    yield ""
    chosen = systems(options.precision, options.mode)
    with ExitStack() as stack:
        for system in chosen:
            system.start(sys.executable if system.engine == MODICUM else options.peer_python, spec, stack)
        running = [system for system in chosen if not system.unmeasured]
        measure(running, options.tokens, options.rounds)
        for system in running:
            system.process.stdin.close()
    check_model(running)
    yield from table(running)
    if missing := not_offered(options.precision, options.mode):
        yield ""
        yield f"Not offered: {', '.join(missing)}."
    reasons = {system.engine: system.unmeasured for system in chosen if system.unmeasured}
    for engine, reason in reasons.items():
        yield ""
        yield f"{engine} was not measured: {reason}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python in which the peers are installed")
    parser.add_argument("--target", default="modicum-code-target")
    parser.add_argument("--draft", default="modicum-code-draft")
    parser.add_argument("--large", action="store_true", help="the random 0.2B model instead of a pair")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16", "float16", "int8"))
    parser.add_argument("--mode", nargs="+", choices=("plain", "draft", "lookup"))
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a markdown file to write as well")
    options = parser.parse_args(arguments, argparse.Namespace(command=arguments))
    options.precision = options.precision or ["float32", "bfloat16"] + ["float16", "int8"] * options.large
    options.mode = options.mode or (["plain"] if options.large else ["plain", "draft", "lookup"])
    if options.large and options.mode != ["plain"]:
        parser.error("--large has no draft and its text does not repeat: leave --mode at plain")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    lines = []
    with tempfile.TemporaryDirectory() as work:
        for line in report(options, Path(work)):
            print(line, flush=True)
            lines.append(line)
    if options.out:
        partly = options.out.with_name(f"{options.out.name}.partial")
        partly.write_text("\n".join(lines) + "\n")
        partly.replace(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
