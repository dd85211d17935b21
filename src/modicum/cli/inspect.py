"""`modicum inspect`: what a model is and costs, from its name, or its config and the headers of its files alone."""

import json
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import typer

from modicum.cli import common, inspect_captioner, inspect_vivit
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum inspect modicum-code-target

modicum inspect ./model --json

modicum inspect vivit-b/16x2

modicum inspect vivit-l/16x2 --variant factorized_encoder --temporal-layers 24 --frames 128 --views 1x3"""

Model = Annotated[
    str,
    typer.Argument(
        help="Name of a model that ships with modicum, a ViViT's name such as vivit-b/16x2, a local folder, or a Hugging "
        "Face hub id."
    ),
]


def inspect(
    model: Model,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Of a named ViViT: spacetime, factorized_encoder, factorized_self_attention or factorized_dot_product; "
            "all four without it."
        ),
    ] = None,
    temporal_layers: Annotated[int | None, typer.Option(help="Of a factorized encoder; 0 averages over time.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of one view.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels of one view: a side, or height x width, as 224x320.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes to tell apart.")] = None,
    pooling: Annotated[str | None, typer.Option(help="token, gap, gmp or gsp.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads, for grouped queries in the encoder.")] = None,
    sampled_frames: Annotated[int | None, typer.Option(help="Frames kept by uniform frame sampling.")] = None,
    attention_order: Annotated[
        str | None, typer.Option(help="Of factorized_self_attention: space_time or time_space.")
    ] = None,
    views: Annotated[str | None, typer.Option(help="Temporal views x crops of a video; 4x3 if not given.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run the ViViT on this machine, warmed up, in float32.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Sizes and costs: a text model's or captioner's key-value caches at each number of heads, a ViViT's multiply-adds."""
    given = {
        "variant": variant,
        "temporal_layers": temporal_layers,
        "num_frames": frames,
        "image_size": None if size is None else common.parse_size(size),
        "num_classes": classes,
        "pooling": pooling,
        "n_kv_heads": kv_heads,
        "sampled_frames": sampled_frames,
        "attention_order": attention_order,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    shown = common.parse_views(views or "4x3")
    if inspect_vivit.is_name(model):
        facts = inspect_vivit.gather_named(model, settings, shown, measure=measure)
    else:
        if settings:
            raise UsageError(
                f"{model} is a checkpoint and its configuration is its own: leave out everything but --views, --measure "
                "and --json, or give a ViViT's name such as vivit-b/16x2"
            )
        facts = gather(model, shown, measure=measure)
    if "gflops" not in facts and (views or measure):
        kind = "captioner" if "memory_slots" in facts else "text model"
        raise UsageError(f"{model} is a {kind}: leave out --views and --measure, which are for classifying videos")
    if as_json:
        print(json.dumps(facts))
    elif "gflops" in facts:
        inspect_vivit.show(facts)
    elif "memory_slots" in facts:
        inspect_captioner.show(facts)
    else:
        show(facts)


def show(facts: dict[str, Any]) -> None:
    """A text model's facts, and a row per number of key-value heads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    names = (
        "family",
        "parameters",
        "encoder_layers",
        "layers",
        "width",
        "context",
        "vocabulary",
        "dtype",
        "file_bytes",
    )
    for name in names:
        value = facts.get(name)
        if value is None:
            continue
        label = name.replace("_", " ")
        console.print(f"{label:<16} {value:,}" if isinstance(value, int) else f"{label:<16} {value}")
    console.print(f"{'heads':<16} {facts['query_heads']} query, {facts['kv_heads']} key-value, of {facts['head_dim']}")
    limited = facts["context"] is not None
    whole = ["cache at full context"] if limited else []
    table = Table("key-value heads", "KV bytes/token", *whole, "saved", "parameters", box=None)
    for row in facts["groups"]:
        table.add_row(
            str(row["kv_heads"]),
            f"{row['kv_bytes_per_token']:,}",
            *([f"{row['cache_bytes'] / 1e6:,.1f} MB"] if limited else []),
            f"{row['saved']:.0%}",
            f"{row['parameters']:,}",
            style="bold" if row["kv_heads"] == facts["kv_heads"] else None,
        )
    console.print(table)
    if "encoder_layers" in facts:
        console.print("Key-value heads are the decoder's; a token takes as much whether it is read or written.")
    for window in facts["windows"]:
        console.print(
            f"The cache holds the full context in every layer, of which {window['layers']} of {facts['layers']} see only "
            f"the last {window['window']:,} tokens."
        )


def gather(model: str, views: tuple[int, int], *, measure: bool) -> dict[str, Any]:
    """The facts of a checkpoint, without reading a weight."""
    from modicum import resources
    from modicum.checkpoint.hub import outline
    from modicum.checkpoint.native import read_config
    from modicum.config import CaptionerConfig, VivitConfig

    found = outline(resources.model_presets().get(model) or model)
    config = read_config(found.config)
    if isinstance(config, VivitConfig):
        stored = {"dtype": found.dtype, "file_bytes": found.file_bytes}
        return {**inspect_vivit.gather(model, config, views, measure=measure), **stored}
    if isinstance(config, CaptionerConfig):
        return {**inspect_captioner.gather(config, found.dtype), "file_bytes": found.file_bytes}
    return {**gather_text(config, found.dtype), "file_bytes": found.file_bytes}


def gather_text(config: Any, dtype: str) -> dict[str, Any]:
    """The facts of a language model whose weights and cache are of `dtype`. `context` is None where nothing limits it."""
    import torch

    from modicum.config import EncoderDecoderConfig

    encoder = {"encoder_layers": config.n_encoder_layers} if isinstance(config, EncoderDecoderConfig) else {}
    context = None if encoder else config.max_seq_len
    groups = []
    for kv_heads in [g for g in range(config.n_kv_heads, 0, -1) if config.n_kv_heads % g == 0]:
        per_token = 2 * config.n_layers * kv_heads * config.head_dim * getattr(torch, dtype).itemsize
        fewer = config.n_kv_heads - kv_heads
        groups.append(
            {
                "kv_heads": kv_heads,
                "kv_bytes_per_token": per_token,
                "cache_bytes": None if context is None else per_token * context,
                "saved": fewer / config.n_kv_heads,
                "parameters": count_parameters(replace(config, n_kv_heads=kv_heads)),
            }
        )
    # A window as long as the context limits nothing.
    given = () if encoder else config.windows
    windows = Counter(window for window in given if window is not None and window < config.max_seq_len)
    return {
        "family": config.family,
        "parameters": groups[0]["parameters"],
        **encoder,
        "layers": config.n_layers,
        "width": config.dim,
        "query_heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "context": context,
        "vocabulary": config.vocab_size,
        "dtype": dtype,
        "kv_bytes_per_token": groups[0]["kv_bytes_per_token"],
        "groups": groups,
        "windows": [{"window": window, "layers": layers} for window, layers in sorted(windows.items())],
    }


def count_parameters(config: Any) -> int:
    """How many numbers a model of this configuration learns; a tied head is the embedding, counted once."""
    from modicum.assembly import empty

    return sum(parameter.numel() for parameter in empty(config).parameters())
