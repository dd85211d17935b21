"""The reference pair on files it has never seen: bits per byte beside `xz -9e`, and how often the draft is accepted.

    python benchmarks/reference_pair.py [--target FOLDER --draft FOLDER] [-k 4] [--prompts 24]

The held-out files are those that training.json names, from the running Python's library; xz compresses them as one
stream, which is its best case. Acceptance is measured on continuations of 128 tokens in float32.
"""

import argparse
import lzma
import math
from pathlib import Path

import torch

import modicum
from modicum import resources
from modicum.train.evaluate import quality
from modicum.train.text import held_out_texts


def nats(model, text: str, window: int = 512) -> tuple[float, int]:
    """Total nats of a text and its number of tokens; the end-of-text token opens it."""
    found = quality(model, torch.tensor([0, *model.tokenizer.encode(text)]), window)
    return found.nats_per_token * found.n_tokens, found.n_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="modicum-code-target")
    parser.add_argument("--draft", default="modicum-code-draft")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=24)
    options = parser.parse_args()
    presets = resources.model_presets()
    target, draft = (modicum.load(name, dtype="float32") for name in (options.target, options.draft))
    texts = held_out_texts(Path(presets.get(options.target, options.target)))
    whole = "".join(texts).encode()
    n_bytes = len(whole)
    xz = len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) * 8 / n_bytes
    print(f"{len(texts)} held-out files, {n_bytes:,} bytes; xz -9e: {xz:.3f} bits/byte")
    for name, model in (("target", target), ("draft", draft)):
        sums = [nats(model, text) for text in texts]
        total, count = (sum(values) for values in zip(*sums, strict=True))
        print(f"{name}: {total / count:.4f} nats/token, {total / math.log(2) / n_bytes:.3f} bits/byte")
    prompts = [target.tokenizer.encode(text)[100:200] for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt) == 100][: options.prompts]
    for temperature in (0, 0.8, 1.0):
        out = modicum.generate(
            target, prompts, draft=draft, num_draft_tokens=options.k, temperature=temperature, seed=0, ignore_eos=True
        )
        positions = " ".join(f"{share:.3f}" for share in out.stats.acceptance_by_position)
        rate, per_call = out.stats.acceptance_rate, out.stats.tokens_per_target_call
        print(f"T = {temperature}: accepted {rate:.3f} (by position {positions}), {per_call:.2f} tokens per call")


if __name__ == "__main__":
    main()
