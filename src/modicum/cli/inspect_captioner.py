"""What `modicum inspect` says of a captioner: parameters by part, and what its caches take per clip and per token."""

from collections import Counter
from typing import Any

PARTS = ("encoder", "projection", "cross_attention", "decoder")


def gather(config: Any, dtype: str) -> dict[str, Any]:
    """The facts of one configuration whose weights and caches are of `dtype`."""
    import torch

    from modicum.config import with_kv_heads

    size, parts = getattr(torch, dtype).itemsize, parameters_of(config)
    groups = []
    for kv_heads in [g for g in range(config.n_kv_heads, 0, -1) if config.n_kv_heads % g == 0]:
        per_slot = 2 * config.n_layers * kv_heads * config.head_dim * size
        groups.append(
            {
                "kv_heads": kv_heads,
                "kv_bytes_per_token": per_slot,
                "context_bytes_per_clip": per_slot * config.memory_slots,
                "saved": 1 - kv_heads / config.n_kv_heads,
                "parameters": sum(parameters_of(with_kv_heads(config, kv_heads)).values()),
            }
        )
    watching = config.encoder
    return {
        "family": config.family,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "encoder": watching.variant,
        "shares_encoder": config.shares_encoder,
        "frames": watching.num_frames,
        "size": list(watching.image_size),
        "memory": config.memory,
        "memory_slots": config.memory_slots,
        "decoder": config.decoder.family,
        "layers": config.n_layers,
        "width": config.dim,
        "query_heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "dtype": dtype,
        "kv_bytes_per_token": groups[0]["kv_bytes_per_token"],
        "context_bytes_per_clip": groups[0]["context_bytes_per_clip"],
        "groups": groups,
    }


def parameters_of(config: Any) -> dict[str, int]:
    """How many numbers each part learns; a tied head is the embedding, counted once."""
    from modicum.assembly import empty

    counted: Counter[str] = Counter()
    for name, parameter in empty(config).named_parameters():
        counted[part_of(name)] += parameter.numel()
    return {part: counted[part] for part in PARTS}


def part_of(name: str) -> str:
    """Which part a tensor belongs to."""
    owner = name.partition(".")[0]
    if owner == "decoder":
        return "cross_attention" if ".cross" in name else "decoder"
    return {"encoder": "encoder", "project": "projection"}[owner]


def show(facts: dict[str, Any]) -> None:
    """The facts as lines, and a row per number of key-value heads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    height, width = facts["size"]
    parts = ", ".join(f"{part.replace('_', ' ')} {n:,}" for part, n in facts["parameters_by_part"].items() if n)
    shared = "" if facts["shares_encoder"] is None else ", another captioner's (its own weights are not in the folder)"
    lines = {
        "family": facts["family"],
        "parameters": f"{facts['parameters']:,}: {parts}",
        "encoder": f"{facts['encoder']}, {facts['frames']} frames of {height}x{width}{shared}",
        "memory": f"{facts['memory']}: {facts['memory_slots']:,} vectors per clip",
        "decoder": f"{facts['decoder']}, {facts['layers']} layers of width {facts['width']:,}",
        "heads": f"{facts['query_heads']} query, {facts['kv_heads']} key-value, of {facts['head_dim']}",
        "context": f"{facts['context']:,}",
        "vocabulary": f"{facts['vocabulary']:,}",
        "dtype": facts["dtype"],
    }
    if "file_bytes" in facts:
        lines["file bytes"] = f"{facts['file_bytes']:,}"
    for label, value in lines.items():
        console.print(f"{label:<16} {value}", soft_wrap=True)
    table = Table("key-value heads", "of a clip", "KV bytes/token", "saved", "parameters", box=None)
    for row in facts["groups"]:
        table.add_row(
            str(row["kv_heads"]),
            f"{row['context_bytes_per_clip'] / 1e6:,.1f} MB",
            f"{row['kv_bytes_per_token']:,}",
            f"{row['saved']:.0%}",
            f"{row['parameters']:,}",
            style="bold" if row["kv_heads"] == facts["kv_heads"] else None,
        )
    console.print(table)
    console.print("Key-value heads are the decoder's: of what it wrote, and of what it was shown.", soft_wrap=True)
