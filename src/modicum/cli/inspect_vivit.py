"""What `modicum inspect` says of a ViViT: parameters, tokens, and its cost in two conventions."""

from pathlib import Path
from typing import Any

from modicum.errors import UsageError


def is_name(model: str) -> bool:
    """Whether this is a ViViT's name, or was meant to be one."""
    from modicum.vivit.build import NAME

    return bool(NAME.fullmatch(model)) or (model.lower().startswith("vivit-") and not Path(model).exists())


def gather_named(model: str, settings: dict[str, Any], views: tuple[int, int], *, measure: bool) -> dict[str, Any]:
    """The facts of a name with settings; without a variant those of `build`'s default, and all four as `variants`.

    A variant that cannot be built with these settings has its refusal in place of its facts.
    """
    from typing import get_args

    from modicum.config import Variant
    from modicum.vivit.build import named_config

    if "variant" in settings:
        return gather(model, named_config(model, **settings), views, measure=measure)
    default = named_config(model, **settings)
    variants = []
    for variant in get_args(Variant):
        own = {name: value for name, value in settings.items() if name != "temporal_layers"}
        try:
            config = default if variant == default.variant else named_config(model, variant=variant, **own)
        except UsageError as refusal:
            variants.append({"model": model, "variant": variant, "refused": str(refusal)})
        else:
            variants.append(gather(model, config, views, measure=measure))
    chosen = next(facts for facts in variants if facts["variant"] == default.variant)
    return {**chosen, "variants": variants}


def gather(model: str, config: Any, views: tuple[int, int], *, measure: bool) -> dict[str, Any]:
    """The facts of one configuration; `measure` runs it."""
    from modicum.vivit.flops import cost

    counted, n_views = cost(config), views[0] * views[1]
    facts = {
        "model": model,
        "family": "vivit",
        "variant": config.variant,
        "params": counted.parameters,
        "frames": config.num_frames,
        "size": list(config.image_size),
        "classes": config.num_classes,
        "tokens": counted.tokens[0] * counted.tokens[1],
        "tokens_time": counted.tokens[0],
        "tokens_space": counted.tokens[1],
        "gflops": counted.gflops,
        "gmacs": counted.gmacs,
        "views": list(views),
        "gflops_per_video": counted.gflops * n_views,
        "gmacs_per_video": counted.gmacs * n_views,
        "config": config.to_dict(),
    }
    return {**facts, **(measured(config, counted.gmacs) if measure else {})}


def measured(config: Any, gmacs: float) -> dict[str, Any]:
    """One clip in float32 through random weights, packed for inference: the median of three after one to warm up."""
    from itertools import pairwise
    from statistics import median
    from time import perf_counter

    import torch

    from modicum.vivit.build import initialise
    from modicum.vivit.model import Vivit

    model = Vivit(config)
    initialise(model)
    model.for_inference()
    video = torch.rand(1, config.num_frames, *config.image_size, 3)
    moments = []
    with torch.inference_mode():
        for _ in range(4):
            model(video)
            moments.append(perf_counter())
    seconds = median(after - before for before, after in pairwise(moments))
    return {"seconds_per_view": seconds, "gmacs_per_second": gmacs / seconds, "threads": torch.get_num_threads()}


def show(facts: dict[str, Any]) -> None:
    """One model as lines, several as a table."""
    from rich.console import Console

    console = Console(highlight=False)
    several = facts.get("variants", [])
    views = f"{facts['views'][0]}x{facts['views'][1]} views"
    for label, value in (common_lines(facts) if several else lines(facts, views)).items():
        console.print(f"{label:<16} {value}", soft_wrap=True)
    if several:
        console.print(table_of(several, views))
        for row in several:
            if "refused" in row:
                console.print(f"{row['variant']}: {row['refused']}", soft_wrap=True)
    console.print(
        "GFLOPs as the paper counts them: a multiply-add is 1, an elementwise operation 1/2. GMAC: multiply-adds alone.",
        style="dim",
        soft_wrap=True,
    )


def common_lines(facts: dict[str, Any]) -> dict[str, str]:
    """What the four variants share."""
    height, width = facts["size"]
    kept = facts["config"]["sampled_frames"]
    frames = f"{facts['frames']} frames" if kept is None else f"{kept} of {facts['frames']} frames"
    return {
        "input": f"{frames} of {height}x{width}, {facts['classes']} classes",
        "tokens": f"{facts['tokens']:,} = {facts['tokens_time']} in time x {facts['tokens_space']} in space",
    }


def lines(facts: dict[str, Any], views: str) -> dict[str, str]:
    variant = facts["variant"]
    if variant == "factorized_encoder":
        variant += f", {facts['config']['temporal_layers']} temporal layers"
    shown = {
        "variant": variant,
        "parameters": f"{facts['params']:,}",
        **common_lines(facts),
        "GFLOPs": f"{facts['gflops']:,.1f} per view, {facts['gflops_per_video']:,.1f} per video of {views}",
        "GMAC": f"{facts['gmacs']:,.1f} per view, {facts['gmacs_per_video']:,.1f} per video",
    }
    if "file_bytes" in facts:
        shown |= {"dtype": facts["dtype"], "file bytes": f"{facts['file_bytes']:,}"}
    if "seconds_per_view" in facts:
        shown["measured"] = (
            f"{facts['seconds_per_view']:.3f} s per view, {facts['gmacs_per_second']:,.1f} GMAC/s, "
            f"float32, {facts['threads']} threads"
        )
    return shown


def table_of(variants: list[dict[str, Any]], views: str) -> Any:
    from rich.table import Table

    timed = any("seconds_per_view" in row for row in variants)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("variant", no_wrap=True)
    for title in ("parameters", "GFLOPs", "GMAC", views, *(("s/view", "GMAC/s") if timed else ())):
        table.add_column(title, justify="right")
    for row in variants:
        if "refused" in row:
            table.add_row(row["variant"], *["-"] * (len(table.columns) - 1))
            continue
        cells = [f"{row['params']:,}", *(f"{row[key]:,.1f}" for key in ("gflops", "gmacs", "gflops_per_video"))]
        if timed:
            cells += [f"{row['seconds_per_view']:.3f}", f"{row['gmacs_per_second']:,.1f}"]
        table.add_row(row["variant"], *cells)
    return table
