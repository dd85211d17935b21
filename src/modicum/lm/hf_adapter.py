"""Families without native code, run by `transformers` behind the same interface as `Decoder`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError, UsageError


class HFAdapter:
    """A causal language model of `transformers`: plain at any batch of equally long prompts, speculation row by row.

    Its caches keep one length for all rows, so a batch never mixes prompt lengths here, and a rejected draft is cropped.
    """

    ragged = False
    tokenizer: Any = None
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, module: Any) -> None:
        self.module = module.eval()
        text = module.config.get_text_config()
        context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        if context is None:
            raise CheckpointError(
                f"config.json of `{text.model_type}` gives no `max_position_embeddings`, so its context is unknown: add it"
            )
        self.config = SimpleNamespace(family=text.model_type, vocab_size=text.vocab_size, max_seq_len=context)

    def __call__(self, ids_BL: Tensor, cache: "AdapterCache | None" = None, *, at_BN: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`: int64 [B, L] -> logits [B, L, V], or [B, N, V] at the tokens `at_BN`."""
        past = None if cache is None else cache.past
        logits_BLV = self.module(input_ids=ids_BL, past_key_values=past, use_cache=cache is not None).logits
        if cache is not None:
            cache.written = ids_BL.shape[1]
        if at_BN is None:
            return logits_BLV
        return logits_BLV.gather(1, at_BN[..., None].expand(-1, -1, logits_BLV.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def cache_bytes_per_token(self) -> int:
        """An upper bound, in bytes: as if every layer were multi-head."""
        text = self.module.config.get_text_config()
        return 2 * text.num_hidden_layers * text.hidden_size * self.module.dtype.itemsize

    def new_cache(self, batch: int, capacity: int) -> "AdapterCache":
        return AdapterCache(self.module.config, batch, self.device)

    def check_speculation(self) -> None:
        """Raise UsageError if this model's state cannot be rolled back after a rejected draft."""
        if not self.new_cache(1, 1).croppable:
            raise UsageError(
                f"`{self.config.family}` keeps a state that cannot be rolled back after a rejected draft: "
                "generate without a draft"
            )

    def for_inference(self, weights: str | None = None) -> "HFAdapter":
        if weights is not None:
            raise UsageError(f"{weights} weights are for families with native code, not for `{self.config.family}`")
        return self


class AdapterCache:
    """A cache of `transformers` with the part of `KVCache`'s interface that uniform rows need."""

    def __init__(self, config: Any, batch: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.past = DynamicCache(config=config)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.written = 0

    @property
    def croppable(self) -> bool:
        layers = getattr(self.past, "layers", [])
        return all(getattr(layer, "is_croppable", False) and not layer.is_sliding for layer in layers)

    def commit(self, n_B: Tensor | int, known: list[int] | None = None, *, at_most: int = 0) -> None:
        """Keep the first tokens of the last call: all of them, or in a single row as many as `n_B`."""
        kept = n_B if isinstance(n_B, int) else int(n_B[0])
        self._crop(self.written - kept)
        self.lengths_B = self.lengths_B + n_B
        self.written = 0

    def truncate(self, lengths_B: Tensor, known: list[int] | None = None) -> None:
        shorter_B = torch.minimum(self.lengths_B, lengths_B)
        self._crop(int((self.lengths_B - shorter_B)[0]))
        self.lengths_B = shorter_B

    def keep(self, rows: list[int], known: list[int] | None = None) -> None:
        index = torch.tensor(rows, device=self.lengths_B.device)
        self.past.batch_select_indices(index)
        self.lengths_B = self.lengths_B[index]

    def _crop(self, n_tokens: int) -> None:
        if n_tokens:
            self.past.crop(-n_tokens)


def load_adapter(folder: Path, device: torch.device, dtype: Any, unknown: CheckpointError) -> HFAdapter:
    """Load `folder` through `transformers`; `unknown` is why there is no native code for it.

    Raises:
        CheckpointError: `transformers` is not installed or does not know the family either.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise unknown from None
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    return HFAdapter(module.to(device))  # type: ignore[arg-type]
