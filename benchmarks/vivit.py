"""ViViT's four models side by side, and Model 1 against transformers' at the same weights: time and memory per clip.

    python benchmarks/vivit.py [--size b] [--frames 32] [--image 224] [--dtype float32|bfloat16] [--rounds 5]

Everything runs in one process, in turns, batch 1, after a warm-up; figures are medians. The paper's runtimes on a TPU-v3
(table 2 of 2103.15691: 58.9, 17.4, 31.7 and 22.9 ms) stand in the ratios 1 : 0.30 : 0.54 : 0.39. "of peak" is the rate of
multiply-adds against that of a large square product of the same dtype, measured in the same turns.
"""

import argparse
import gc
import platform
import resource
import statistics
import time

import torch

from modicum import vivit
from modicum.vivit.flops import cost

VARIANTS = ("spacetime", "factorized_encoder", "factorized_self_attention", "factorized_dot_product")
PAPER = dict(zip(VARIANTS, (1.0, 17.4 / 58.9, 31.7 / 58.9, 22.9 / 58.9), strict=True))
PRODUCT = 2048


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def stock(model, dtype):
    """transformers' ViViT with the weights of our Model 1, through a stock folder."""
    import tempfile

    from transformers import VivitForVideoClassification

    import modicum

    with tempfile.TemporaryDirectory() as folder:
        modicum.save(model, f"{folder}/model")
        return VivitForVideoClassification.from_pretrained(f"{folder}/model", dtype=dtype).eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", help="s, b, l or h, at 16x2")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    settings = {"num_frames": options.frames, "image_size": options.image}
    name = f"vivit-{options.size}/16x2"
    models = {variant: vivit.build(name, variant=variant, **settings).to(dtype) for variant in VARIANTS}
    theirs = stock(models["spacetime"], dtype)
    gmacs = {variant: cost(model.config).macs / 1e9 for variant, model in models.items()}
    for model in models.values():
        model.for_inference()
    gc.collect()
    clip = (torch.rand(1, options.frames, options.image, options.image, 3) * 2 - 1).to(dtype)
    pixel_values = clip.movedim(-1, 2).contiguous()
    a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    works = {variant: lambda model=model: model(clip) for variant, model in models.items()}
    works["transformers"] = lambda: theirs(pixel_values=pixel_values)
    works["product"] = lambda: [a @ b for _ in range(8)]
    times: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(options.rounds + 1):
        for key, work in works.items():
            took = seconds(work)
            if turn:
                times[key].append(took)
    medians = {key: statistics.median(values) for key, values in times.items()}
    peak = 8 * PRODUCT**3 / medians["product"] / 1e9
    print(f"{name}, {options.frames}x{options.image}x{options.image}, {options.dtype}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, a large product {peak:.0f} GMAC/s")
    print(f"{'':<28}{'seconds':>9}{'to Model 1':>12}{'paper':>8}{'GMAC':>8}{'of peak':>9}")
    first = medians["spacetime"]
    for key in (*VARIANTS, "transformers"):
        work_done = gmacs[key if key in gmacs else "spacetime"]
        paper = f"{PAPER[key]:.2f}" if key in PAPER else ""
        share = work_done / medians[key] / peak
        print(f"{key:<28}{medians[key]:>9.3f}{medians[key] / first:>12.2f}{paper:>8}{work_done:>8.0f}{share:>9.0%}")
    difference = (models["spacetime"](clip) - theirs(pixel_values=pixel_values).logits).abs().max().item()
    print(f"largest difference of logits from transformers': {difference:.2e}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
