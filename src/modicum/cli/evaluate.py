"""`modicum evaluate`: models side by side, on text they have not seen."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum evaluate ./model --data held-out.txt

modicum evaluate ./multi-head ./gqa-4 ./gqa-1 --data ./texts --contexts 512,4096 --plot quality.png

modicum evaluate ./converted --original ./multi-head --data notes/*.md --json

modicum evaluate ./captioner ./captioner-2 --data ./captioned-videos --control shuffled"""


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models with one tokenizer; the first is the original.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text: a file, a folder, a pattern, or `stdlib`. For captioners a data set's folder, or its annotations."
        ),
    ],
    original: Annotated[
        str | None, typer.Option(help="What divergence is measured from; the first model if not given.")
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Context lengths at which a step of decoding is timed, separated by commas.")
    ] = "256",
    max_tokens: Annotated[int, typer.Option(help="Read at most so many tokens of the text.")] = 100_000,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; 1024, or the context if shorter; of a T5 568.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw into a PNG: quality against time and, where models differ in them, ways to convert, training "
            "afterwards, key-value heads."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Of captioners: shuffled puts each clip's frames in random order, blank blackens them."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of captioners: which videos; those that are held out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plot if it exists.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    as_json: common.Json = False,
) -> None:
    """Cross-entropy, divergence from the original, bytes of key-value cache and time per token, model by model.

    A T5 is asked for spans dropped from the text, as it was trained to be, the same for every model. Captioners write about
    the held-out videos of a data set, in the layout of MSR-VTT or VATEX: facts of our own scenes, BLEU-4, CIDEr-D.
    """
    from rich.console import Console

    from modicum.cli import evaluate_captions

    if evaluate_captions.is_captioner(models[0]):
        if original is not None or plot is not None or window is not None:
            raise UsageError("--original, --plot and --window are about text models: leave them out for captioners")
        evaluate_captions.evaluate(models, data, control, split, device, dtype, as_json=as_json)
        return
    if control is not None or split is not None:
        raise UsageError(f"--control and --split are about captioners and {models[0]} is none: leave them out")
    if plot is not None:
        from modicum.report.figures import load_pyplot

        common.check_writable(plot, force=force)
        load_pyplot()
    lengths = parse_contexts(contexts)
    rows = measure([original or models[0], *models], data, lengths, max_tokens, window, device, dtype)
    if plot is not None:
        from modicum.report.quality import evaluation_figure

        evaluation_figure(rows, plot)
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

    from modicum.cli.inspect import count_parameters
    from modicum.lm.encoder_decoder import EncoderDecoder
    from modicum.train.evaluate import quality, seconds_per_token, usual_window
    from modicum.train.text import SUFFIXES, read_text, texts_of

    files = texts_of(data, SUFFIXES, ())
    if not files:
        raise UsageError(f"{data} holds no text: give a file, or a folder with {', '.join(SUFFIXES)} files")
    reference = text_model(names[0], window, device, dtype)
    text = "\n".join(read_text(path) for path in files.values())
    ids = torch.tensor(reference.tokenizer.encode(text)[: max_tokens + 1])
    n_bytes = len(reference.tokenizer.decode(ids.tolist()).encode())
    rows = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for name in names[1:]:
            same = name == names[0]
            model = reference if same else text_model(name, window, device, dtype)
            difference = None if same else reference.tokenizer.difference(model.tokenizer)
            if difference:
                raise UsageError(f"{name} has another tokenizer than {names[0]} ({difference}): evaluate it by itself")
            task = bar.add_task(name, total=len(ids))
            size = min(window or usual_window(model), model.config.max_seq_len)
            found = quality(
                model, ids, size, None if same else reference, lambda end, task=task: bar.update(task, completed=end)
            )
            config = model.config
            bits = found.nats_per_token * found.n_tokens / math.log(2) / n_bytes
            rows.append(
                {
                    "model": name,
                    **history(model.files or {}, original=same),
                    "query_heads": config.n_heads,
                    "kv_heads": config.n_kv_heads,
                    "parameters": count_parameters(config),
                    "tokens": found.n_tokens,
                    "nats_per_token": found.nats_per_token,
                    # A T5 is asked for a part of the text alone, which has no bytes of its own.
                    "bits_per_byte": None if isinstance(model, EncoderDecoder) else bits,
                    "divergence": 0.0 if same else found.divergence,
                    "kv_bytes_per_token": model.cache_bytes_per_token,
                    "ms_per_token": {length: seconds_per_token(model, length) * 1e3 for length in contexts},
                }
            )
    return rows


def text_model(name: str, window: int | None, device: str, dtype: str) -> Any:
    """A native language model with a tokenizer, that can be judged on windows of that size."""
    from modicum import api
    from modicum.lm.language_model import LanguageModel
    from modicum.lm.objective import objective_of
    from modicum.train.evaluate import usual_window

    model = api.load(name, device=device, dtype=dtype)
    if not isinstance(model, LanguageModel) or model.tokenizer is None:
        raise UsageError(f"{name} is not a language model of a native family with a tokenizer: give one")
    objective_of(model, window or usual_window(model))
    return model


def history(files: Mapping[str, bytes], *, original: bool) -> dict[str, Any]:
    """What a model's training.json says of how it became what it is.

    `method`: how it was converted to fewer key-value heads, None if it was not; `fraction`: what it was trained on for
    afterwards, in units of the original's training, None if unknown; `control`: whether this is the original, or the
    original trained on for that fraction.
    """
    from modicum.checkpoint.record import Record

    record = Record.of(files)
    uptrained, conversion = record.uptrained, record.values.get("conversion")
    methods = [entry["method"] for entry in (conversion, *uptrained) if entry and entry["method"]]
    total = uptrained[-1]["original_tokens"] if uptrained else None
    fraction = sum(entry["tokens"] for entry in uptrained) / total if total else None
    if not uptrained and (methods or original):
        fraction = 0.0
    control = not methods and (original or any(entry["control"] for entry in uptrained))
    return {"method": methods[-1] if methods else None, "fraction": fraction, "control": control}


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Column, Table

    contexts = list(rows[0]["ms_per_token"])
    made = ["made by"] if any(row["method"] or row["fraction"] for row in rows) else []
    times = [f"ms at\n{n:,}" for n in contexts]
    heads = ["heads", *made, "nats\n/token", "bits\n/byte", "KL", "KV bytes\n/token", *times]
    result = Table(Column("model", overflow="fold"), *(Column(head, no_wrap=True) for head in heads), box=None)
    for row in rows:
        result.add_row(
            row["model"],
            f"{row['query_heads']}:{row['kv_heads']}",
            *(origin(row) for _ in made),
            f"{row['nats_per_token']:.4f}",
            "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
            f"{row['divergence']:.4f}",
            f"{row['kv_bytes_per_token']:,}",
            *(f"{row['ms_per_token'][n]:.2f}" for n in contexts),
        )
    return result


def origin(row: dict[str, Any]) -> str:
    """How a model was made: the way of conversion, and a line for the training afterwards."""
    training = f"{100 * row['fraction']:g} %" if row["fraction"] else ""
    return "\n".join(part for part in (row["method"] or "", training) if part)


def parse_contexts(text: str) -> list[int]:
    """ "512,4096" -> [512, 4096]"""
    lengths = text.split(",")
    if not all(length.strip().isdecimal() and int(length) for length in lengths):
        raise UsageError(f"--contexts {text} is not a list of lengths: write whole numbers, as in 512,4096")
    return [int(length) for length in lengths]
