"""ViViT's four models side by side, and Model 1 against transformers' at the same weights: time and memory per clip.

    python benchmarks/vivit.py [--size b] [--frames 32] [--image 224] [--dtype float32|bfloat16] [--rounds 5]

Everything runs in one process, in turns, batch 1, after a warm-up; figures are medians. The paper's runtimes on a TPU-v3
(table 2 of 2103.15691: 58.9, 17.4, 31.7 and 22.9 ms) stand in the ratios 1 : 0.30 : 0.54 : 0.39. "of peak" is the rate of
multiply-adds against that of a large square product of the same dtype, measured in the same turns. "GB" is the peak of a
process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch

import modicum
from modicum import vivit
from modicum.core.linear import PackedLinear
from modicum.report.machine import machine
from modicum.vivit.flops import cost

VARIANTS = ("spacetime", "factorized_encoder", "factorized_self_attention", "factorized_dot_product")
PAPER = dict(zip(VARIANTS, (1.0, 17.4 / 58.9, 31.7 / 58.9, 22.9 / 58.9), strict=True))
THEIRS = "transformers"
SYSTEMS = (*VARIANTS, THEIRS)
PRODUCT = 4096


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def stock(model, dtype):
    """transformers' ViViT with the weights of our Model 1, through a stock folder."""
    from transformers import VivitForVideoClassification

    with tempfile.TemporaryDirectory() as folder:
        modicum.save(model, f"{folder}/model")
        return VivitForVideoClassification.from_pretrained(f"{folder}/model", dtype=dtype).eval()


def works_of(options, names):
    """What each system does with one clip: our variants packed for inference, and transformers at Model 1's weights."""
    dtype = getattr(torch, options.dtype)
    settings = {"num_frames": options.frames, "image_size": options.image}
    clip = (torch.rand(1, options.frames, options.image, options.image, 3) * 2 - 1).to(dtype)
    pixel_values = clip.movedim(-1, 2).contiguous()
    works, configs = {}, {}
    for name in names:
        torch.manual_seed(0)
        variant = "spacetime" if name == THEIRS else name
        model = vivit.build(f"vivit-{options.size}/16x2", variant=variant, **settings).to(dtype)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        configs[name] = model.config
        if name == THEIRS:
            works[name] = lambda theirs=stock(model, dtype): theirs(pixel_values=pixel_values).logits  # noqa: B008
        else:
            works[name] = partial(model.for_inference(), clip)
    return works, configs


def peak_memory(options, name) -> float:
    """GB that a process of its own takes for one clip, weights and libraries included."""
    sizes = ["--size", options.size, "--frames", options.frames, "--image", options.image, "--dtype", options.dtype]
    command = [sys.executable, __file__, "--only", name, *map(str, sizes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", help="s, b, l or h, at 16x2")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SYSTEMS, help="one clip of one system, and the process's peak memory in GB")
    options = parser.parse_args()
    if options.only:
        works_of(options, [options.only])[0][options.only]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    memory = {name: peak_memory(options, name) for name in SYSTEMS}
    works, configs = works_of(options, SYSTEMS)
    difference = (works["spacetime"]() - works[THEIRS]()).abs().max().item()
    # At this size a product runs as fast as it can; in either layout, since one of them is slow on some processors.
    layer = torch.nn.Linear(PRODUCT, PRODUCT, bias=False).to(getattr(torch, options.dtype))
    rows = torch.randn(PRODUCT, PRODUCT).to(layer.weight.dtype)
    packed = PackedLinear(layer.weight, None)
    works |= {"plain product": lambda: layer(rows), "packed product": lambda: packed(rows)}
    times: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(options.rounds + 1):
        for key, work in works.items():
            took = seconds(work)
            if turn:
                times[key].append(took)
    medians = {key: statistics.median(values) for key, values in times.items()}
    peak = PRODUCT**3 / min(medians.pop("plain product"), medians.pop("packed product")) / 1e9
    shape = f"{options.frames}x{options.image}x{options.image}"
    print(f"vivit-{options.size}/16x2, {shape}, {options.dtype}")
    print(f"{machine()}; a large product {peak:.0f} GMAC/s")
    print(f"{'':<28}{'seconds':>9}{'to Model 1':>12}{'paper':>8}{'GMAC':>8}{'of peak':>9}{'GB':>7}")
    for key, took in medians.items():
        gmacs = cost(configs[key]).gmacs
        paper = f"{PAPER[key]:.2f}" if key in PAPER else ""
        row = f"{key:<28}{took:>9.3f}{took / medians['spacetime']:>12.2f}{paper:>8}{gmacs:>8.0f}"
        print(f"{row}{gmacs / took / peak:>9.0%}{memory[key]:>7.1f}")
    print(f"largest difference between Model 1's logits and transformers': {difference:.2e}")


if __name__ == "__main__":
    main()
