"""`modicum evaluate`: models side by side, on text they have not seen."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum evaluate ./model --data held-out.txt

modicum evaluate ./multi-head ./gqa-4 ./gqa-1 --data ./texts --contexts 512,4096 --plot quality.png

modicum evaluate ./converted --original ./multi-head --data notes/*.md --json"""

SUFFIXES = (".txt", ".md", ".py", ".rst")


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models with one tokenizer; the first is the original.")],
    data: Annotated[str, typer.Option(help="Text: a file, a folder, a pattern, or `stdlib`.")],
    original: Annotated[
        str | None, typer.Option(help="What divergence is measured from; the first model if not given.")
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Context lengths at which a step of decoding is timed, separated by commas.")
    ] = "256",
    max_tokens: Annotated[int, typer.Option(help="Read at most so many tokens of the text.")] = 100_000,
    window: Annotated[int | None, typer.Option(help="Tokens read at once; 1024, or the context if shorter.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against time into a PNG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plot if it exists.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    as_json: common.Json = False,
) -> None:
    """Cross-entropy, divergence from the original, bytes of key-value cache and time per token, model by model."""
    from rich.console import Console

    if plot is not None:
        from modicum.report.figures import load_pyplot

        common.check_writable(plot, force=force)
        load_pyplot()
    lengths = parse_contexts(contexts)
    rows = measure([original or models[0], *models], data, lengths, max_tokens, window, device, dtype)
    if plot is not None:
        from modicum.report.figures import quality_figure

        quality_figure(rows, plot)
    if as_json:
        print(json.dumps(rows))
        return
    Console(highlight=False).print(table(rows))
    if plot is not None:
        Console(stderr=True, highlight=False).print(f"figure in {plot}")


def measure(
    names: list[str], data: str, contexts: list[int], max_tokens: int, window: int | None, device: str, dtype: str
) -> list[dict[str, Any]]:
    """A row per model after the first name, which is the original's. One model and the original are in memory at once."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.cli.inspect import count_parameters
    from modicum.train.evaluate import quality, seconds_per_token
    from modicum.train.text import read_text, texts_of

    files = texts_of(data, SUFFIXES, ())
    if not files:
        raise UsageError(f"{data} holds no text: give a file, or a folder with {', '.join(SUFFIXES)} files")
    reference = text_model(api, names[0], device, dtype)
    text = "\n".join(read_text(path) for path in files.values())
    ids = torch.tensor(reference.tokenizer.encode(text)[: max_tokens + 1])
    n_bytes = len(reference.tokenizer.decode(ids.tolist()).encode())
    rows = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for name in names[1:]:
            same = name == names[0]
            model = reference if same else text_model(api, name, device, dtype)
            difference = None if same else reference.tokenizer.difference(model.tokenizer)
            if difference:
                raise UsageError(f"{name} has another tokenizer than {names[0]} ({difference}): evaluate it by itself")
            task = bar.add_task(name, total=len(ids))
            size = min(window or 1024, model.config.max_seq_len)
            found = quality(
                model, ids, size, None if same else reference, lambda end, task=task: bar.update(task, completed=end)
            )
            config = model.config
            rows.append(
                {
                    "model": name,
                    "query_heads": config.n_heads,
                    "kv_heads": config.n_kv_heads,
                    "parameters": count_parameters(config),
                    "tokens": found.n_tokens,
                    "nats_per_token": found.nats_per_token,
                    "bits_per_byte": found.nats_per_token * found.n_tokens / math.log(2) / n_bytes,
                    "divergence": 0.0 if same else found.divergence,
                    "kv_bytes_per_token": model.cache_bytes_per_token,
                    "ms_per_token": {length: seconds_per_token(model, length) * 1e3 for length in contexts},
                }
            )
    return rows


def text_model(api: Any, name: str, device: str, dtype: str) -> Any:
    """A native language model with a tokenizer."""
    from modicum.lm.decoder import Decoder

    model = api.load(name, device=device, dtype=dtype)
    if not isinstance(model, Decoder) or model.tokenizer is None:
        raise UsageError(f"{name} is not a language model of a native family with a tokenizer: give one")
    return model


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Column, Table

    contexts = list(rows[0]["ms_per_token"])
    heads = ["heads", "nats\n/token", "bits\n/byte", "KL", "KV bytes\n/token", *(f"ms at\n{n:,}" for n in contexts)]
    result = Table(Column("model", overflow="fold"), *(Column(head, no_wrap=True) for head in heads), box=None)
    for row in rows:
        result.add_row(
            row["model"],
            f"{row['query_heads']}:{row['kv_heads']}",
            f"{row['nats_per_token']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['divergence']:.4f}",
            f"{row['kv_bytes_per_token']:,}",
            *(f"{row['ms_per_token'][n]:.2f}" for n in contexts),
        )
    return result


def parse_contexts(text: str) -> list[int]:
    """ "512,4096" -> [512, 4096]"""
    lengths = text.split(",")
    if not all(length.strip().isdecimal() and int(length) for length in lengths):
        raise UsageError(f"--contexts {text} is not a list of lengths: write whole numbers, as in 512,4096")
    return [int(length) for length in lengths]
