"""What every native language model offers to those who write with it, load it and save it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from modicum.core.cache import KVCache
from modicum.core.linear import Linear, Packable, dense_state, pack


class LanguageModel(Packable):
    """Token ids to logits, with a cache, for inference or training. Subclasses have `config`, `embed` and `head`."""

    config: Any
    embed: nn.Embedding
    head: Linear
    tokenizer: Any = None
    stock_config: dict[str, Any] | None = None  # config.json as it was read, carried through to `save`
    files: dict[str, bytes] | None = None  # tokenizer and other files, likewise
    eos_ids: frozenset[int] = frozenset()
    ragged = True  # every row of a batch keeps a length of its own
    _fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers, in bytes."""
        c = self.config
        return 2 * c.n_layers * c.n_kv_heads * c.head_dim * self.embed.weight.element_size()

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens, on the model's device, in its dtype."""
        c = self.config
        dtype = self.embed.weight.dtype
        return KVCache(c.n_layers, batch, c.n_kv_heads, capacity, c.head_dim, dtype=dtype, device=self.device)

    def for_inference(self, weights: str | None = None) -> Self:
        """Pack the weights in place for the device they are on; evaluation mode from here on. Returns the model.

        Args:
            weights: None keeps them as they are. "int8", on a CPU, rounds those of linear layers to bytes, a scale per
                output channel: half the memory traffic of bfloat16, and the model cannot be saved any more.
                "int8-dynamic" rounds what they are multiplied with as well, token by token: faster, and less exact.

        Raises:
            UsageError: an unknown form, one that this machine has no products for, or a model packed otherwise already.
        """
        self.eval()
        self._fingerprint = self.fingerprint
        if self.config.tie_embeddings and self.head.packed is None:
            # The embedding reads rows of the plain table, so a tied head keeps it and packs a view of its own.
            self.head.weight = nn.Parameter(self.embed.weight.detach(), requires_grad=False)
        pack(self, weights)
        return self

    @property
    def fingerprint(self) -> str:
        """A hash by which a drafter knows the model that it was trained for, whatever dtype it is loaded in.

        It is of the configuration and a sample of every tensor, in bfloat16: all that a large model is would take minutes.
        """
        if self._fingerprint is not None:  # packed weights no longer change
            return self._fingerprint
        return fingerprint_of(self.config.to_dict(), self.dense_state())

    def dense_state(self) -> dict[str, Tensor]:
        """The state dict as if never packed; a tied head is left out."""
        state = dense_state(self)
        if self.config.tie_embeddings:
            state.pop("head.weight", None)
        return state


def fingerprint_of(config: dict[str, Any], state: Mapping[str, Tensor]) -> str:
    """A hash of a configuration and a sample of every tensor, in bfloat16, whatever dtype they are in."""
    samples = [sampled(state[name]).to(torch.bfloat16) for name in sorted(state)]
    result = hashlib.sha256(json.dumps(without_dtype(config), sort_keys=True).encode())
    result.update(torch.cat(samples).view(torch.int16).cpu().numpy().tobytes())
    return result.hexdigest()


def without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """The same description of a model, and of those it is made of, but for what its weights are stored in."""
    parts = ((key, without_dtype(value) if isinstance(value, dict) else value) for key, value in config.items())
    return {key: value for key, value in parts if key != "dtype"}


def sampled(tensor: Tensor, most: int = 64) -> Tensor:
    """At most `most` of a tensor's numbers, evenly from all of it."""
    flat = tensor.detach().flatten()
    return flat[:: -(-flat.numel() // most)]
