"""What ViViT's choices are worth at small scale: Tables 1 to 4 and Figure 9 of 2103.15691, on clips that modicum makes.

    python benchmarks/vivit_ablation.py encodings      Table 1: sampled frames or tubelets, and how their filters begin
    python benchmarks/vivit_ablation.py models         Table 2: Models 1 to 4, and the mean over time
    python benchmarks/vivit_ablation.py temporal       Table 3: layers of the temporal encoder
    python benchmarks/vivit_ablation.py regularisers   Table 4: added one by one
    python benchmarks/vivit_ablation.py views          Figure 9: frames of a clip against views of a video
    python benchmarks/vivit_ablation.py all            all of them
    python benchmarks/vivit_ablation.py table          everything measured so far, as Markdown

A clip shows objects of one shape that do one thing; as in EPIC-Kitchens a model has two heads, noun (the shape) and verb
(what it does), and an action is right where both are. Nouns can be seen in a frame; verbs take several. Models begin, as
in the paper, with an image ViT, trained here on single frames of other clips. A seed decides the image model, fresh
weights, the order of the clips and every draw; the clips themselves are the same for all.

Each result is a line of --results as soon as it is there, and is not measured again: a run may be stopped and gone on with.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import modicum
from modicum.classification.views import temporal_views
from modicum.config import VivitConfig
from modicum.report.machine import machine
from modicum.train.optim import learning_rate
from modicum.train.recipe import OptimSection
from modicum.train.regularize import mixup, one_hot, smooth, soft_cross_entropy
from modicum.video.augment import Augment, augment
from modicum.video.synthetic import Event, draw_scene, render
from modicum.video.synthetic.scenes import COLOURS, COUNTS, MOTIONS, SHAPES
from modicum.vivit.build import initialise
from modicum.vivit.flops import cost
from modicum.vivit.initialization import init_from_image, init_from_video
from modicum.vivit.model import Vivit

METRICS = ("action", "noun", "verb")
# Figure 9 needs videos longer than a clip; its clips are taken at stride 2, as the paper's.
VIEWS = (1, 2, 4, 8)

Cell = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of everything. A clip is `frames` frames of `side` pixels, a model reads crops of `crop`."""

    clips: int = 1500
    few_clips: int = 400
    few_steps: int = 1000
    held_out: int = 800
    images: int = 3000
    frames: int = 32
    side: int = 36
    crop: int = 32
    patch: int = 8
    dim: int = 64
    layers: int = 3
    steps: int = 500
    batch: int = 32
    lr: float = 0.1


SCALES = {
    "small": Scale(),
    "toy": Scale(
        clips=12, few_clips=6, few_steps=3, held_out=10, images=12, side=18, crop=16, dim=8, layers=1, steps=2, batch=4
    ),
}
HEADS = 4
VERBS = list(MOTIONS)
# What is drawn for what: first words of a key.
TRAINING, HELD_OUT, IMAGES, SOURCE, ORDER, START = range(6)


@dataclass(frozen=True)
class Spec:
    """One training: a model, where it begins, what it is regularised with. `few`: Table 4's few clips and more steps.

    `kernel` random keeps the tubelets' fresh filters beside the image model's other weights.
    """

    variant: str = "factorized_encoder"
    temporal_layers: int = 2
    num_frames: int = 8
    stride: int = 4
    tubelet_frames: int = 2
    sampled_frames: int | None = None
    start: str = "image"
    kernel: str = "central_frame"
    few: bool = False
    colour_jitter: float = 0.0
    randaugment_layers: int = 0
    stochastic_depth: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0


# Before a clip of the benchmark is seen: an image model of single frames, and a video model of another task.
IMAGE = Spec("spacetime", 0, num_frames=1, stride=1, tubelet_frames=1, start="nothing")
VIDEO = Spec()
IMAGE_HEADS = {"shape": len(SHAPES), "colour": len(COLOURS), "count": len(COUNTS)}
VIDEO_HEADS = {"first": len(VERBS), "then": len(VERBS)}
CLIP_HEADS = {"noun": len(SHAPES), "verb": len(VERBS)}


@dataclass(frozen=True)
class Row:
    """A line of a table: what is trained, and what the paper has for it. `views`: those it is judged with."""

    name: str
    spec: Spec
    paper: str
    views: int = 1


@dataclass(frozen=True)
class Claim:
    """An order that the paper reports: the row `better` above the row `worse`, by their names."""

    better: str
    worse: str
    where: str


@dataclass(frozen=True)
class Part:
    title: str
    paper: str  # what the column of the paper's figures holds
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]


BASE = Spec()
SPACETIME = replace(BASE, variant="spacetime", temporal_layers=0)
# As many tokens as four sampled frames: four tubelets of four frames.
TUBELETS = replace(SPACETIME, num_frames=16, stride=2, tubelet_frames=4)
FEW = replace(BASE, few=True, colour_jitter=0.8)
STARTED = replace(FEW, start="video")
DROPPED = replace(STARTED, stochastic_depth=0.2)
RANDAUGMENTED = replace(DROPPED, randaugment_layers=2)
SMOOTHED = replace(RANDAUGMENTED, label_smoothing=0.2)


def layers(count: int) -> Spec:
    return replace(BASE, temporal_layers=count)


def frames_and_views() -> Iterator[Row]:
    for num_frames in (4, 8, 16):
        for views in VIEWS:
            yield Row(f"{num_frames} frames, {views} views", replace(BASE, num_frames=num_frames, stride=2), "", views)


PARTS = {
    "encodings": Part(
        "Table 1: input encodings (Model 1, equal numbers of tokens)",
        "K400, top-1",
        (
            Row("uniform frame sampling", replace(TUBELETS, sampled_frames=4, tubelet_frames=1), "78.5"),
            Row("tubelets, random filters", replace(TUBELETS, kernel="random"), "73.2"),
            Row("tubelets, inflated filters", replace(TUBELETS, kernel="inflate"), "77.6"),
            Row("tubelets, central frame", TUBELETS, "79.2"),
            Row("tubelets, nothing from an image model", replace(TUBELETS, start="nothing"), "-"),
        ),
        (
            Claim("tubelets, inflated filters", "tubelets, random filters", "Table 1"),
            Claim("tubelets, central frame", "tubelets, inflated filters", "Table 1"),
            Claim("tubelets, central frame", "uniform frame sampling", "Table 1"),
            Claim("tubelets, random filters", "tubelets, nothing from an image model", "section 3.4"),
        ),
    ),
    "models": Part(
        "Table 2: models",
        "K400, top-1; EPIC-Kitchens, action",
        (
            Row("Model 1, spacetime", SPACETIME, "80.0; 43.1"),
            Row("Model 2, factorized encoder", BASE, "78.8; 43.7"),
            Row(
                "Model 3, factorized self-attention",
                replace(SPACETIME, variant="factorized_self_attention"),
                "77.4; 39.1",
            ),
            Row("Model 4, factorized dot-product", replace(SPACETIME, variant="factorized_dot_product"), "76.3; 39.5"),
            Row("Model 2 with the mean over time", layers(0), "75.8; 38.8"),
        ),
        (
            Claim("Model 1, spacetime", "Model 2, factorized encoder", "K400"),
            Claim("Model 2, factorized encoder", "Model 1, spacetime", "EPIC-Kitchens"),
            Claim("Model 2, factorized encoder", "Model 3, factorized self-attention", "both"),
            Claim("Model 3, factorized self-attention", "Model 4, factorized dot-product", "K400"),
            Claim("Model 2, factorized encoder", "Model 2 with the mean over time", "both"),
        ),
    ),
    "temporal": Part(
        "Table 3: layers of the temporal encoder (Model 2)",
        "K400, top-1",
        (
            Row("0, the mean", layers(0), "75.8"),
            Row("1", layers(1), "78.6"),
            Row("2", BASE, "-"),
            Row("4", layers(4), "78.8"),
        ),
        (Claim("1", "0, the mean", "Table 3"), Claim("4", "1", "Table 3")),
    ),
    "regularisers": Part(
        "Table 4: added one by one (Model 2, few clips)",
        "EPIC-Kitchens, action",
        (
            Row("random crop, colour jitter", FEW, "38.4"),
            Row("+ start from a video model", STARTED, "39.6"),
            Row("+ stochastic depth 0.2", DROPPED, "40.2"),
            Row("+ RandAugment 2 x 15", RANDAUGMENTED, "41.1"),
            Row("+ label smoothing 0.2", SMOOTHED, "43.1"),
            Row("+ mixup 0.1", replace(SMOOTHED, mixup=0.1), "43.7"),
        ),
        (
            Claim("+ start from a video model", "random crop, colour jitter", "Table 4"),
            Claim("+ stochastic depth 0.2", "+ start from a video model", "Table 4"),
            Claim("+ RandAugment 2 x 15", "+ stochastic depth 0.2", "Table 4"),
            Claim("+ label smoothing 0.2", "+ RandAugment 2 x 15", "Table 4"),
            Claim("+ mixup 0.1", "+ label smoothing 0.2", "Table 4"),
            Claim("+ mixup 0.1", "+ start from a video model", "Table 4"),
        ),
    ),
    "views": Part(
        "Figure 9: frames of a clip and views of a video (Model 2, videos of 32 frames, stride 2)",
        "",
        tuple(frames_and_views()),
        (
            Claim("4 frames, 4 views", "4 frames, 1 views", "more views, until they cover the video"),
            Claim("8 frames, 2 views", "8 frames, 1 views", "more views, until they cover the video"),
            Claim("16 frames, 1 views", "4 frames, 1 views", "longer clips, with one view"),
            Claim("16 frames, 1 views", "4 frames, 4 views", "at saturation, expected flat"),
        ),
    ),
}


VIEWED = {row.spec for row in PARTS["views"].rows}


def events_of(key: list[int], count: int, scale: Scale) -> tuple[tuple[Event, ...], np.ndarray]:
    """A scene of `count` events and its clip, uint8 [T, H, W, 3]."""
    random = np.random.default_rng(key)
    while len((scene := draw_scene(random, held_out=False)).events) != count:
        pass
    return scene.events, render(scene, random, scale.frames, scale.side)


def place(name: str, scale: Scale, cache: Path) -> Path:
    """Where something made for these sizes is kept: others have a folder of their own."""
    digest = hashlib.sha256(json.dumps(asdict(scale)).encode()).hexdigest()[:12]
    return cache / digest / name


def kept(purpose: int, scale: Scale, cache: Path) -> tuple[np.ndarray, Tensor]:
    """Clips and their targets: uint8 [N, T, H, W, 3] and int64 [N, heads], made once."""
    count = {HELD_OUT: scale.held_out, IMAGES: scale.images}.get(purpose, scale.clips)
    path = place(f"clips-{purpose}.npz", scale, cache)
    if not path.exists():
        videos, targets = [], []
        for index in range(count):
            events, video = events_of([purpose, index], 2 if purpose == SOURCE else 1, scale)
            if purpose == IMAGES:
                video = video[[np.random.default_rng([purpose, index, 1]).integers(scale.frames)]]
                (event,) = events
                target = [SHAPES.index(event.shape), COLOURS.index(event.colour), event.count - 1]
            elif purpose == SOURCE:
                target = [VERBS.index(event.motion) for event in events]
            else:
                target = [SHAPES.index(events[0].shape), VERBS.index(events[0].motion)]
            videos.append(video)
            targets.append(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file is there whole or not at all.
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, video=np.stack(videos), targets=np.array(targets))
        unfinished.replace(path)
    with np.load(path) as file:
        return file["video"], torch.from_numpy(file["targets"])


def prepare(name: str, cache: Path) -> None:
    """Make all clips."""
    for purpose in (TRAINING, HELD_OUT, IMAGES, SOURCE):
        kept(purpose, SCALES[name], cache)


def build(spec: Spec, heads: dict[str, int], scale: Scale, seed: int) -> Vivit:
    token = spec.variant in ("spacetime", "factorized_encoder")
    model = Vivit(
        VivitConfig(
            variant=spec.variant,
            image_size=(scale.crop, scale.crop),
            num_frames=spec.num_frames,
            sampled_frames=spec.sampled_frames,
            tubelet_size=(spec.tubelet_frames, scale.patch, scale.patch),
            dim=scale.dim,
            n_layers=scale.layers,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            head_dim=scale.dim // HEADS,
            ffn_dim=4 * scale.dim,
            temporal_layers=spec.temporal_layers,
            pooling="token" if token else "gap",
            num_classes=sum(heads.values()),
            heads=tuple(heads.items()),
            stochastic_depth=spec.stochastic_depth,
        )
    )
    initialise(model, seed)
    return model


def start_model(kind: str, name: str, seed: int, cache: Path, threads: int) -> str:
    """Train and keep a model that others begin with; how good it is."""
    torch.set_num_threads(threads)
    scale = SCALES[name]
    folder = place(f"{kind}-{seed}", scale, cache)
    if folder.exists():
        return "kept"
    image = kind == "image"
    spec, heads = (IMAGE, IMAGE_HEADS) if image else (VIDEO, VIDEO_HEADS)
    videos, targets = kept(IMAGES if image else SOURCE, scale, cache)
    model = build(spec, heads, scale, seed)
    if not image:
        init_from_image(model, place(f"image-{seed}", scale, cache))
    n = len(videos) * 9 // 10
    train(model, spec, heads, videos[:n], targets[:n], scale, seed)
    found = accuracy(model, spec, videos[n:], targets[n:], scale, 1)
    unfinished = folder.with_name(folder.name + ".unfinished")
    (write_image_vit if image else modicum.save)(model, unfinished)
    unfinished.rename(folder)
    return ", ".join(f"{name} {share:.1%}" for name, share in found.items())


def write_image_vit(model: Vivit, folder: Path) -> None:
    """A model of single frames as the image ViT it is, in Hugging Face's layout."""
    state, c = model.state_dict(), model.config
    patch = c.tubelet_size[1]
    embeddings = {
        "patch_embeddings.projection.weight": state["embed.project.weight"]
        .unflatten(1, (patch, patch, 3))
        .movedim(3, 1),
        "patch_embeddings.projection.bias": state["embed.project.bias"],
        "position_embeddings": state["encoder.positions"][None],
        "cls_token": state["encoder.class_token"][None, None],
    }
    tensors = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    names = {
        **{f"attention.project.{k[0]}": f"attention.attention.{k}" for k in ("query", "key", "value")},
        "attention.out": "attention.output.dense",
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "ffn.project.up": "intermediate.dense",
        "ffn.down": "output.dense",
    }
    for leaf in ("weight", "bias"):
        tensors[f"layernorm.{leaf}"] = state[f"encoder.norm.{leaf}"]
        for i in range(c.n_layers):
            for ours, theirs in names.items():
                tensors[f"encoder.layer.{i}.{theirs}.{leaf}"] = state[f"encoder.blocks.{i}.{ours}.{leaf}"]
    config = {
        "model_type": "vit",
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.ffn_dim,
        "patch_size": patch,
        "image_size": list(c.image_size),
        "hidden_act": "gelu_new",
        "layer_norm_eps": c.norm_eps,
    }
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    # Pixels in [-1, 1], as ours.
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


def begin(model: Vivit, spec: Spec, scale: Scale, seed: int, cache: Path) -> None:
    """Give a fresh model the weights that its training starts from."""
    if spec.start == "video":
        init_from_video(model, modicum.load(place(f"video-{seed}", scale, cache)))
    elif spec.start == "image":
        fresh = model.embed.project.weight.detach().clone()
        kernel: Any = "central_frame" if spec.kernel == "random" else spec.kernel
        init_from_image(model, place(f"image-{seed}", scale, cache), kernel)
        if spec.kernel == "random":
            model.embed.project.weight.data.copy_(fresh)


def train(
    model: Vivit, spec: Spec, heads: dict[str, int], videos: np.ndarray, targets: Tensor, scale: Scale, seed: int
) -> float:
    """The paper's training, in small: SGD with momentum, warm-up and cosine. The mean loss of the last tenth."""
    steps = scale.few_steps if spec.few else scale.steps
    settings = Augment(
        flip=0,  # left is not right
        short_side=scale.side,
        colour_jitter=spec.colour_jitter,
        randaugment_layers=spec.randaugment_layers,
    )
    optim = OptimSection(steps=steps, batch=scale.batch, lr=scale.lr, warmup=steps // 10, floor=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=scale.lr, momentum=0.9)
    epochs = -(-steps * scale.batch // len(videos))
    order = np.concatenate([np.random.default_rng([ORDER, seed, e]).permutation(len(videos)) for e in range(epochs)])
    torch.manual_seed(seed)  # of stochastic depth
    losses = []
    model.train()
    for step in range(steps):
        rows = order[step * scale.batch : (step + 1) * scale.batch]
        clips = []
        for place_in_batch, row in enumerate(rows):
            key = (seed, step, place_in_batch)
            room = max(1, videos.shape[1] - (spec.num_frames - 1) * spec.stride)
            first = int(np.random.default_rng([START, *key]).integers(room))
            frames = videos[row, first + np.arange(spec.num_frames) * spec.stride]
            clips.append(augment(torch.from_numpy(frames), (scale.crop, scale.crop), settings, key))
        soft = smooth(one_hot(targets[rows], heads), spec.label_smoothing)
        video, soft = mixup(torch.stack(clips), soft, spec.mixup, (seed, step))
        loss = soft_cross_entropy(model(video), soft)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return statistics.mean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def accuracy(
    model: Vivit, spec: Spec, videos: np.ndarray, targets: Tensor, scale: Scale, views: int
) -> dict[str, float]:
    """Shares of videos of which each head is right, and all of them are ("action"), by the mean of the views' logits."""
    at = (scale.side - scale.crop) // 2
    crops = videos[:, :, at : at + scale.crop, at : at + scale.crop]
    right = []
    for first in range(0, len(crops), 100):
        sums: dict[str, Any] = {}
        for frames in temporal_views(videos.shape[1], spec.num_frames, spec.stride, views):
            for name, logits in model(torch.from_numpy(crops[first : first + 100][:, frames])).items():
                sums[name] = sums.get(name, 0) + logits
        chosen_BH = torch.stack([logits.argmax(1) for logits in sums.values()], 1)
        right.append(chosen_BH == targets[first : first + 100])
    right_BH = torch.cat(right)
    shares = dict(zip(sums, right_BH.float().mean(0).tolist(), strict=True))
    return {"action": right_BH.all(1).float().mean().item(), **shares}


def measure(cell: Cell, cache: Path) -> Cell:
    """One training and what came of it, in a process of its own kind."""
    torch.set_num_threads(cell["threads"])
    began, scale, seed = time.process_time(), SCALES[cell["scale"]], cell["seed"]
    spec = Spec(**cell["spec"])
    videos, targets = kept(TRAINING, scale, cache)
    if spec.few:
        videos, targets = videos[: scale.few_clips], targets[: scale.few_clips]
    model = build(spec, CLIP_HEADS, scale, seed)
    begin(model, spec, scale, seed, cache)
    loss = train(model, spec, CLIP_HEADS, videos, targets, scale, seed)
    judged = kept(HELD_OUT, scale, cache)
    views = VIEWS if spec in VIEWED else (1,)
    return {
        **cell,
        "accuracy": {str(n): accuracy(model, spec, *judged, scale, n) for n in views},
        "loss": loss,
        "mflops": cost(model.config).flops / 1e6,
        "seconds": round(time.process_time() - began, 1),
    }


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is to be measured, each training once, however many tables it stands in."""
    names = PARTS if options.part == "all" else [options.part]
    specs = dict.fromkeys(row.spec for name in names for row in PARTS[name].rows)
    base = {"scale": options.scale, "threads": options.threads}
    return [base | {"seed": seed, "spec": asdict(spec)} for seed in range(options.seeds) for spec in specs]


def key_of(cell: Cell) -> str:
    return json.dumps([cell["scale"], cell["seed"], cell["spec"]], sort_keys=True)


def read_results(path: Path) -> list[Cell]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace) -> None:
    done = {key_of(cell) for cell in read_results(options.results)}
    wanted = cells(options)
    todo = [cell for cell in wanted if key_of(cell) not in done]
    print(f"{len(todo)} of {len(wanted)} to measure", file=sys.stderr)
    if not todo:
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        # Clips, and models to begin with, are in the cache before several processes ask for them.
        pool.submit(prepare, options.scale, options.cache).result()
        starts = {cell["spec"]["start"] for cell in todo}
        seeds = {cell["seed"] for cell in todo}
        for kind in ("image", "video"):
            if kind in starts or "video" in starts:
                made = [pool.submit(start_model, kind, options.scale, s, options.cache, options.threads) for s in seeds]
                for seed, future in zip(seeds, made, strict=True):
                    print(f"{kind} model, seed {seed}: {future.result()}", file=sys.stderr)
        futures: list[Future[Cell]] = [pool.submit(measure, cell, options.cache) for cell in todo]
        for count, future in enumerate(as_completed(futures), 1):
            cell = future.result()
            with options.results.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            action = cell["accuracy"]["1"]["action"]
            changed = {k: v for k, v in cell["spec"].items() if v != getattr(BASE, k)}
            print(
                f"{count}/{len(todo)}  seed {cell['seed']} {changed}: {action:.1%}  {cell['seconds']} s",
                file=sys.stderr,
            )


def table(results: list[Cell], scale: str) -> str:
    """Everything measured at a scale."""
    own = [cell for cell in results if cell["scale"] == scale]
    if not own:
        return "Nothing has been measured yet.\n"
    sizes, seeds = SCALES[scale], sorted({cell["seed"] for cell in own})
    threads = sorted({cell["threads"] for cell in own})
    lines = [
        "# ViViT's choices at small scale",
        "",
        machine() + f"; each training on {threads[0]} threads" + (f" to {threads[-1]}" if len(threads) > 1 else ""),
        "",
        f"{sizes.layers} layers of {sizes.dim}, clips of {sizes.crop} pixels a side, {sizes.steps} steps of {sizes.batch} "
        f"on {sizes.clips} clips (in Table 4 {sizes.few_steps} on {sizes.few_clips}), judged by {sizes.held_out} others; "
        f"{len(seeds)} seeds, {len(own)} trainings of {statistics.median(c['seconds'] for c in own):.0f} CPU seconds each. "
        "Means and standard deviations over the seeds, in percent. An order is called reproduced where the gap of the two "
        "means exceeds the deviation of a difference, the root of the sum of both variances; reversed where it does so the "
        "other way; else flat.",
        "",
    ]
    for part in PARTS.values():
        lines += part_table(part, own)
    return "\n".join(lines) + "\n"


def part_table(part: Part, results: list[Cell]) -> list[str]:
    found = {row.name: accuracies(row, results) for row in part.rows}
    if not any(found.values()):
        return []
    views = any(row.views > 1 for row in part.rows)
    heads = [*METRICS, *(["MFLOPs", "of the video seen"] if views else [f"paper ({part.paper})"])]
    lines = [f"## {part.title}", "", "| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row in part.rows:
        figures = [figure([a[metric] for a in found[row.name]]) for metric in METRICS]
        if views:
            cost = next((c["mflops"] for c in results if c["spec"] == asdict(row.spec)), None)
            seen = min(1, row.views * row.spec.num_frames * row.spec.stride / 32)
            figures += ["-" if cost is None else f"{cost * row.views:.0f}", f"{seen:.0%}"]
        else:
            figures.append(row.paper)
        lines.append(f"| {row.name} | " + " | ".join(figures) + " |")
    lines.append("")
    for claim in part.claims:
        better, worse = found[claim.better], found[claim.worse]
        if better and worse:
            verdicts = [
                f"{metric} {verdict([a[metric] for a in better], [a[metric] for a in worse])}" for metric in METRICS
            ]
            lines.append(f"- {claim.better} > {claim.worse} ({claim.where}): {'; '.join(verdicts)}")
    return [*lines, ""]


def accuracies(row: Row, results: list[Cell]) -> list[dict[str, float]]:
    """One per seed, in percent."""
    found = [cell for cell in results if cell["spec"] == asdict(row.spec) and str(row.views) in cell["accuracy"]]
    return [{k: 100 * v for k, v in cell["accuracy"][str(row.views)].items()} for cell in found]


def figure(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def verdict(better: list[float], worse: list[float]) -> str:
    """Whether an order shows: the gap of the means against the deviation of a difference of two runs."""
    gap = statistics.mean(better) - statistics.mean(worse)
    if min(len(better), len(worse)) < 2:
        return f"{gap:+.1f}, one seed is no evidence"
    deviation = (statistics.variance(better) + statistics.variance(worse)) ** 0.5
    word = "flat" if abs(gap) <= deviation else "reproduced" if gap > 0 else "reversed"
    return f"{gap:+.1f} ± {deviation:.1f}, {word}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all", "table"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="trainings at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--scale", choices=list(SCALES), default="small", help="toy: seconds, to see that it runs")
    parser.add_argument("--results", type=Path, default=Path("runs/vivit-ablation/results.jsonl"))
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/vivit-ablation/cache"), help="clips and starting models"
    )
    options = parser.parse_args(arguments)
    if options.part == "table":
        torch.set_num_threads(options.threads)
        print(table(read_results(options.results), options.scale), end="")
    else:
        began = time.perf_counter()
        run(options)
        print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
