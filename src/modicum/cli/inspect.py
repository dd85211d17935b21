"""`modicum inspect`: what a checkpoint is, from its config and the headers of its files alone."""

import json
from dataclasses import replace
from typing import Any

from modicum.cli import common

EXAMPLES = """Examples:

modicum inspect modicum-code-target

modicum inspect ./model --json"""


def inspect(model: common.Target, as_json: common.Json = False) -> None:
    """Family, sizes, parameters, and what the key-value cache costs at each number of key-value heads."""
    facts = gather(model)
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for name in ("family", "parameters", "layers", "width", "context", "vocabulary", "dtype", "file_bytes"):
        value = facts[name]
        label = name.replace("_", " ")
        console.print(f"{label:<16} {value:,}" if isinstance(value, int) else f"{label:<16} {value}")
    console.print(f"{'heads':<16} {facts['query_heads']} query, {facts['kv_heads']} key-value, of {facts['head_dim']}")
    table = Table("key-value heads", "KV bytes/token", "cache at full context", "saved", "parameters", box=None)
    for row in facts["groups"]:
        table.add_row(
            str(row["kv_heads"]),
            f"{row['kv_bytes_per_token']:,}",
            f"{row['cache_bytes'] / 1e6:,.1f} MB",
            f"{row['saved']:.0%}",
            f"{row['parameters']:,}",
            style="bold" if row["kv_heads"] == facts["kv_heads"] else None,
        )
    console.print(table)


def gather(model: str) -> dict[str, Any]:
    """The facts, without reading a weight."""
    from modicum import resources
    from modicum.checkpoint.hf import decoder_config
    from modicum.checkpoint.hub import resolve
    from modicum.checkpoint.io import read_checkpoint

    folder = resources.model_presets().get(model) or resolve(model)
    checkpoint = read_checkpoint(folder)
    config = decoder_config(checkpoint.config)
    # Masks that older files store beside the weights are integers; they are not what the model computes in.
    dtype = next(t.dtype for t in checkpoint.state_dict.values() if t.is_floating_point())
    groups = []
    for kv_heads in [g for g in range(config.n_kv_heads, 0, -1) if config.n_kv_heads % g == 0]:
        per_token = 2 * config.n_layers * kv_heads * config.head_dim * dtype.itemsize
        fewer = config.n_kv_heads - kv_heads
        groups.append(
            {
                "kv_heads": kv_heads,
                "kv_bytes_per_token": per_token,
                "cache_bytes": per_token * config.max_seq_len,
                "saved": fewer / config.n_kv_heads,
                "parameters": count_parameters(replace(config, n_kv_heads=kv_heads)),
            }
        )
    return {
        "family": config.family,
        "parameters": groups[0]["parameters"],
        "layers": config.n_layers,
        "width": config.dim,
        "query_heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "kv_bytes_per_token": groups[0]["kv_bytes_per_token"],
        "groups": groups,
    }


def count_parameters(config: Any) -> int:
    """How many numbers a model of this configuration learns; a tied head is the embedding, counted once."""
    import torch

    from modicum.lm.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return sum(parameter.numel() for parameter in model.parameters())
