"""modicum against `transformers` on one GPU, side by side in one process; and against the memory's bandwidth.

    python benchmarks/text_gpu.py                            the reference pair, and random Llamas in the shapes of 1B and 8B
    python benchmarks/text_gpu.py --models 8B --rows 1       some of it
    python benchmarks/text_gpu.py --toy                      all of it at toy size on the CPU: shows that it runs, no more

Not run on a GPU so far: only `--toy` has been, and no figure that this prints has been published.

Every round runs each system once, in an order that rotates. Reported are medians over the rounds; what a system does only
once, compiling or capturing, is done before the first and told apart.

Random weights say nothing, and two models that say nothing do not agree. So the models here compute all that they have to,
and then say what a script says (`Scripted`): the target a text, the draft the same text with errors in a known share of
its places. That share is the acceptance, the same for every system that drafts; what it costs is real.

eta is the limit's time over the measured one: every call's weights and the keys and values of its rows, read once at the
bandwidth that this GPU is seen to have, the draft's calls included, for the same tokens per call. Arithmetic is not in it.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import modicum
from modicum import resources
from modicum.config import DecoderConfig, RopeConfig
from modicum.decode.batch import Batch, Request, Row
from modicum.decode.clock import Clock
from modicum.decode.loop import Engine, PlainEngine, run
from modicum.decode.sampling import SamplingParams
from modicum.lm.decoder import Decoder
from modicum.report.machine import machine
from modicum.speculative import captured
from modicum.speculative.captured import CapturedEngine
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.loop import SpeculativeEngine

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
SAID = 1e4  # a logit above all others


def llama(
    dim: int, n_layers: int, heads: tuple[int, int], head_dim: int, ffn_dim: int, vocab: int, *, tied: bool
) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=vocab,
        dim=dim,
        n_layers=n_layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        max_seq_len=4096,
        rope=RopeConfig(rotary_dim=head_dim),
        tie_embeddings=tied,
    )


ONE = llama(2048, 16, (32, 8), 64, 8192, 128_256, tied=True)
EIGHT = llama(4096, 32, (32, 8), 128, 14_336, 128_256, tied=False)
SMALL = llama(768, 4, (12, 4), 64, 3072, 128_256, tied=True)
# target and draft
PAIRS = {"1B": (ONE, SMALL), "8B": (EIGHT, ONE)}
TOY = {
    "1B": (llama(24, 2, (6, 2), 4, 36, 53, tied=True), llama(12, 1, (3, 1), 4, 20, 53, tied=True)),
    "8B": (llama(36, 3, (6, 2), 6, 44, 53, tied=False), llama(24, 2, (6, 2), 4, 36, 53, tied=True)),
}


class Scripted(Decoder):
    """A model that says what `script_M` has at each place of its text, after computing what it would have said."""

    script_M: Tensor

    def forward(self, ids_BL: Tensor, cache: Any = None, *, at_BN: Tensor | None = None) -> Tensor:
        logits_BNV = super().forward(ids_BL, cache, at_BN=at_BN)
        places_BN = cache.positions(ids_BL.shape[1]) + 1
        if at_BN is not None:
            places_BN = places_BN.gather(1, at_BN)
        said_BN = self.script_M[places_BN.clamp(max=len(self.script_M) - 1)]
        return logits_BNV.scatter_(-1, said_BN[..., None], SAID)


def scripted(config: DecoderConfig, script: list[int], device: torch.device, dtype: torch.dtype) -> Scripted:
    """A random model in the shape of `config`, made where it runs."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Scripted(config)
    finally:
        torch.set_default_dtype(usual)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02)
    model.script_M = torch.tensor(script, device=device)
    return model.to(device).for_inference()


def scripts(n_tokens: int, vocab: int, acceptance: float) -> tuple[list[int], list[int]]:
    """A text, and the same with the next id instead wherever a coin says so."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab, (n_tokens,), generator=generator)
    wrong = torch.rand(n_tokens, generator=generator) >= acceptance
    return text.tolist(), ((text + wrong) % vocab).tolist()


def theirs(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The same shape in `transformers`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    stock = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with device:
        return AutoModelForCausalLM.from_config(stock, dtype=dtype).eval()


def follow(model: Any, script_M: Tensor) -> Any:
    """Make a model of `transformers` say what a script says, as `Scripted` does. Returns its own `forward`."""
    forward = model.forward

    @functools.wraps(forward)
    def following(*args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        read = 0 if past is None else past.get_seq_length()
        out = forward(*args, **kwargs)
        n_read, n_scored = (args[0] if args else kwargs["input_ids"]).shape[1], out.logits.shape[1]
        places_N = read + n_read - n_scored + 1 + torch.arange(n_scored, device=script_M.device)
        said_N = script_M[places_N.clamp(max=len(script_M) - 1)]
        out.logits.scatter_(-1, said_N[None, :, None].expand(len(out.logits), -1, -1), SAID)
        return out

    model.forward = following
    return forward


def assisted_settings(draft: Any, k: int) -> None:
    draft.generation_config.num_assistant_tokens = k
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0


def hf_options(n_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}


def requests(prompt: list[int], n_rows: int, n_tokens: int) -> list[Request]:
    common = {"prompt": prompt, "params": SamplingParams(temperature=0), "eos_ids": frozenset()}
    return [Request(index=i, key=i, max_total=len(prompt) + n_tokens, **common) for i in range(n_rows)]


def write(engine: Engine, given: list[Request], model: Decoder) -> Row:
    """Write all rows to their ends, which they reach together. Returns one of them."""
    with torch.inference_mode():
        return run(Batch(given, vocab_size=model.config.vocab_size, device=model.device), engine)[-1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    systems: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, list[tuple[float, Any]]]]:
    """Seconds of every system's first run; and for each round seconds and result, systems taking turns."""

    def timed(system: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(device)
        began = time.perf_counter()
        result = system()
        synchronize(device)
        return time.perf_counter() - began, result

    first = {name: timed(system)[0] for name, system in systems.items()}
    names = list(systems)
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(timed(systems[name]))
    return first, found


def bandwidth(device: torch.device, n_bytes: int) -> float:
    """Bytes per second of reading: best of 5 passes."""
    data, clock, best = torch.ones(n_bytes // 4, dtype=torch.float32, device=device), Clock(device), float("inf")
    for _ in range(6):  # the first finds the kernel
        began = clock.stamp()
        data.sum()
        ended = clock.stamp()
        synchronize(device)
        best = min(best, clock.between(began, ended))
    return data.nbytes / best


def weight_bytes(model: Decoder) -> int:
    """What a call reads of the weights: all but a table of embeddings that is not its head as well."""
    state = model.dense_state()
    if not model.config.tie_embeddings:
        del state["embed.weight"]
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def limit(models: list[Decoder], k: int, loops: int, n_rows: int, n_tokens: int, speed: float) -> float:
    """Seconds that so many loops need at least to read what they read, behind `n_tokens` tokens on average."""
    calls = [1, k][: len(models)]
    bytes_of = [weight_bytes(model) + n_rows * n_tokens * model.cache_bytes_per_token for model in models]
    return loops * sum(n * size for n, size in zip(calls, bytes_of, strict=True)) / speed


def describe(row: Row) -> dict[str, float]:
    """Of a run of ours: seconds of the loops, their number, and how long the device waited between two, in the mean."""
    stats = row.stats
    loops = stats.target_calls
    idle = stats.seconds_by_part.get("idle", 0.0) / max(1, loops - 1)
    return {"seconds": stats.seconds - stats.seconds_by_part["prefill"], "loops": loops, "idle": idle}


def random_pair(name: str, options: argparse.Namespace, speed: float) -> None:
    """One size, every number of rows: ours captured and not, and `transformers` eager, compiled and assisted."""
    device, dtype, k = options.device, options.dtype, options.k
    shapes = (TOY if options.toy else PAIRS)[name]
    total = options.prompt + options.tokens
    text, with_errors = scripts(total + 1, shapes[0].vocab_size, options.acceptance)
    target, draft = (
        scripted(shape, script, device, dtype) for shape, script in zip(shapes, (text, with_errors), strict=True)
    )
    hf_target, hf_draft = (theirs(shape, device, dtype) for shape in shapes)
    assisted_settings(hf_draft, k)
    own = {id(hf_target): torch.tensor(text, device=device), id(hf_draft): torch.tensor(with_errors, device=device)}
    for n_rows in options.rows:
        given = requests(text[: options.prompt], n_rows, options.tokens)
        ids = torch.tensor([text[: options.prompt]] * n_rows, device=device)
        engines: dict[str, tuple[Engine, list[Decoder]]] = {
            "modicum plain": (CapturedEngine(target, None, 0), [target]),
            f"modicum K={k}": (CapturedEngine(target, ModelDrafter(draft), k), [target, draft]),
            "modicum plain, not captured": (PlainEngine(target), [target]),
            f"modicum K={k}, not captured": (SpeculativeEngine(target, ModelDrafter(draft), k), [target, draft]),
        }
        systems: dict[str, Callable[[], Any]] = {
            system: functools.partial(write, engine, given, target) for system, (engine, _) in engines.items()
        }
        settings = {"attention_mask": torch.ones_like(ids), **hf_options(options.tokens)}
        systems["transformers plain"] = lambda ids=ids, settings=settings: hf_target.generate(ids, **settings)
        systems["transformers static, compiled"] = lambda ids=ids, settings=settings: hf_target.generate(
            ids, cache_implementation="static", **settings
        )
        if n_rows == 1:  # more it does not assist

            def assisted(ids: Tensor = ids, settings: dict[str, Any] = settings) -> Any:
                for model in (hf_target, hf_draft):
                    follow(model, own[id(model)])
                try:
                    return hf_target.generate(ids, assistant_model=hf_draft, **settings)
                finally:
                    del hf_target.forward, hf_draft.forward

            systems[f"transformers assisted K={k}"] = assisted
        first, found = measure(systems, options.rounds, device)
        print(f"\n{name}, {n_rows} rows of {options.prompt} + {options.tokens} tokens, acceptance {options.acceptance}")
        report(first, found, n_rows, options.tokens)
        middle = options.prompt + options.tokens // 2
        for system, (_, models) in engines.items():
            runs = [describe(row) for _, row in found[system]]
            loops = int(runs[0]["loops"])
            seconds, idle = (statistics.median(one[part] for one in runs) for part in ("seconds", "idle"))
            least = limit(models, k, loops, n_rows, middle, speed)
            written = f"{options.tokens / loops:.2f} tokens per call, {seconds / loops * 1e3:.3f} ms per loop"
            gap = f", host gap {idle * 1e6:.0f} us" if isinstance(engines[system][0], CapturedEngine) else ""
            print(f"{system}: {written}, eta {least / seconds:.2f}{gap}")
        wrong = [system for system in engines if found[system][-1][1].tokens != text[:total]]
        if wrong:
            raise SystemExit(f"these did not write the script: {', '.join(wrong)}")


def reference_pair(options: argparse.Namespace) -> None:
    """The models that ship with modicum, through the public call. All is overhead at their size."""
    from transformers import AutoModelForCausalLM

    names, presets, k = ("modicum-code-target", "modicum-code-draft"), resources.model_presets(), options.k
    target, draft = (modicum.load(name, device=options.device, dtype=options.dtype) for name in names)
    hf_target, hf_draft = (
        AutoModelForCausalLM.from_pretrained(str(presets[name]), dtype=options.dtype).to(options.device).eval()
        for name in names
    )
    assisted_settings(hf_draft, k)
    prompt = target.tokenizer.encode(PROMPT)
    exact = {"max_new_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
    for n_rows in options.rows:
        given, ids = [prompt] * n_rows, torch.tensor([prompt] * n_rows, device=options.device)
        settings = {"attention_mask": torch.ones_like(ids), **hf_options(options.tokens)}
        systems: dict[str, Callable[[], Any]] = {
            "modicum plain": functools.partial(modicum.generate, target, given, **exact),
            f"modicum K={k}": functools.partial(
                modicum.generate, target, given, draft=draft, num_draft_tokens=k, **exact
            ),
            "transformers plain": functools.partial(hf_target.generate, ids, **settings),
            "transformers static, compiled": functools.partial(
                hf_target.generate, ids, cache_implementation="static", **settings
            ),
        }
        if n_rows == 1:
            systems[f"transformers assisted K={k}"] = functools.partial(
                hf_target.generate, ids, assistant_model=hf_draft, **settings
            )
        print(f"\nreference pair, {n_rows} rows of {len(prompt)} + {options.tokens} tokens")
        report(*measure(systems, options.rounds, options.device), n_rows, options.tokens)


def report(first: dict[str, float], found: dict[str, list[tuple[float, Any]]], n_rows: int, n_tokens: int) -> None:
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    plain = medians["transformers plain"]
    print(f"{'system':<32} {'ms/token':>9} {'tokens/s':>9} {'x transformers plain':>21} {'first run, s':>13}")
    for name, median in medians.items():
        per_token, rate = median / n_tokens * 1e3, n_rows * n_tokens / median
        print(f"{name:<32} {per_token:9.3f} {rate:9.0f} {plain / median:21.2f} {first[name]:13.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference", *PAIRS], choices=["reference", *PAIRS])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the random models' prompts")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        sys.exit("there is no GPU here: give --toy to see that this runs; benchmarks/text_cpu.py measures a CPU")
    options.device = torch.device("cpu" if options.toy else "cuda")
    captured.DEVICES.add("cuda")
    options.dtype = torch.float32 if options.toy else torch.bfloat16
    print(machine(options.device.type))
    if options.toy:
        print("No GPU is used: toy models on the CPU show that the script runs. Nothing below is a measurement.")
    speed = bandwidth(options.device, 1 << 24 if options.toy else 4 << 30)
    print(f"reads {speed / 1e9:.0f} GB/s, best of 5")
    for name in options.models:
        if name == "reference":
            reference_pair(options)
        else:
            random_pair(name, options, speed)


if __name__ == "__main__":
    main()
