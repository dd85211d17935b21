"""training.json: what a folder's model was trained on. `train` writes it; `uptrain` reads it, and adds to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modicum.errors import CheckpointError

RECORD = "training.json"
# What it says of how good the model is, which another model's weights are not.
QUALITY = (
    "val_loss",
    "bits_per_byte",
    "val_accuracy",
    "captions",
    "controls",
    "tokens_per_target_call",
    "acceptance_rate",
)


class Record:
    """A training.json, which may be missing, or another program's: what is not found in it is None.

    `values` is all of it: `tokens` and `settings` are those of the original training, `uptrained` and `finetuned`
    list what followed.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> "Record":
        """From the files beside a checkpoint.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            values = json.loads(files.get(RECORD, b"{}"))
        except ValueError as error:
            raise CheckpointError(f"{RECORD} is not valid JSON ({error}): repair it, or remove it") from error
        return cls(values if isinstance(values, dict) else {})

    @property
    def tokens(self) -> int | None:
        """Of the original training."""
        found = self.values.get("tokens")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def uptrained(self) -> list[dict[str, Any]]:
        found = self.values.get("uptrained")
        return found if isinstance(found, list) else []

    def converted(self, method: str, n_kv_heads: int, *, calibrated: bool) -> bytes:
        """The file of a model with fewer key-value heads. What it says of quality was the original's, and goes."""
        conversion = {"method": method, "kv_heads": n_kv_heads, "calibrated": calibrated}
        return self._with("conversion", conversion)

    def pruned(self, kept: list[int]) -> bytes:
        """The file of a model with these layers only; what it says of quality goes likewise."""
        return self._with("kept_layers", kept)

    def finetuned(self, entry: dict[str, Any]) -> bytes:
        """The file of a model fine-tuned on pairs, `entry` last of those it names; its quality, likewise, is another."""
        before = self.values.get("finetuned")
        return self._with("finetuned", [*(before if isinstance(before, list) else []), entry])

    def _with(self, name: str, value: Any) -> bytes:
        kept = {key: old for key, old in self.values.items() if key not in QUALITY}
        return json.dumps(kept | {name: value}, indent=2).encode()

    def section(self, name: str) -> dict[str, Any]:
        """A table of the original recipe, empty if there is none."""
        settings = self.values.get("settings")
        found = settings.get(name) if isinstance(settings, dict) else None
        return found if isinstance(found, dict) else {}

    def data_of(self, sources: tuple[str, ...]) -> dict[str, Any] | None:
        """How texts were chosen and held out when the model, or what it was made of, was trained on these sources."""
        later = (entry.get("settings", {}).get("data", {}) for entry in self.uptrained)
        for data in (self.section("data"), *later):
            source = data.get("source", ())
            if located((source,) if isinstance(source, str) else source) == located(sources):
                return data
        return None


def located(sources: tuple[str, ...] | list[str]) -> set[str]:
    """Sources under names that do not depend on how a path is spelled."""
    return {source if source == "stdlib" else str(Path(source).expanduser().resolve()) for source in sources}
