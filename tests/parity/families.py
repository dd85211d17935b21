"""Tiny random checkpoints of `transformers`, one or more of every native family, in odd sizes."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 61

COMMON = {"vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 59}


def rope(kind: str, **extra: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 997.0, **extra}}


YARN = rope("yarn", factor=3.0, original_max_position_embeddings=19, beta_fast=11.0, beta_slow=1.5)
LLAMA3 = rope("llama3", factor=7.0, original_max_position_embeddings=23, low_freq_factor=1.0, high_freq_factor=3.0)
GPT2 = {"vocab_size": VOCAB, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 59, "n_inner": 37}
NEOX = {**COMMON, "hidden_size": 64, "intermediate_size": 37, "max_position_embeddings": 59}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-multi-query-tied": ("llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {**LLAMA, "num_key_value_heads": 4}),
    "llama-biases-head-dim": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 14}),
    "llama-linear": ("llama", {**LLAMA, **rope("linear", factor=2.5)}),
    "llama-dynamic": ("llama", {**LLAMA, **rope("dynamic", factor=2.0)}),
    "llama-llama3": ("llama", {**LLAMA, **LLAMA3}),
    "llama-yarn": ("llama", {**LLAMA, **YARN}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": 5}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 14}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-odd-rotary": ("gpt_neox", {**NEOX, "hidden_size": 48}),
    "gpt_neox-sequential": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "attention_bias": False}),
}


def make(case: str, folder: Path, seed: int = 0) -> Any:
    """Write the case's checkpoint to `folder`; returns the `transformers` model, float32, in evaluation mode."""
    kind, settings = CASES[case]
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The stock initialisation leaves norms at 1 and biases at 0, where a mix-up would not show.
            parameter.add_(torch.randn_like(parameter) * 0.17)
    model.save_pretrained(folder)
    return model
