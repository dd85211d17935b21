"""How good captions are, as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

HEADS = ("fact", "right", "majority\nvalue", "majority\ncaption", "judged")


def scores_tables(models: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Rich tables of the scores of several models, by name, each as `CaptionScores.to_dict` gives them: one of the figures
    that every caption has, a line per model, and one of facts for each model that has them."""
    from rich.table import Table

    style: Any = {"box": None, "padding": (0, 1), "pad_edge": False}
    overall = Table("captions by", "videos", "exact", "BLEU-4", "CIDEr-D", **style)
    tables = [overall]
    for name, scores in models.items():
        figures = (f"{scores['exact']:.1%}", f"{scores['bleu4']:.1f}", f"{scores['cider_d']:.2f}")
        overall.add_row(name, str(scores["captions"]), *figures)
        if scores["facts"] is None:
            continue
        facts = Table(*HEADS, title=f"facts told by {name}", title_justify="left", **style)
        for kind, score in scores["facts"].items():
            shares = (share(score[key]) for key in ("right", "majority_value", "majority_caption"))
            facts.add_row(kind, *shares, str(score["judged"]))
        tables.append(facts)
    return tables


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
