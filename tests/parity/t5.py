"""Tiny random T5 checkpoints of `transformers`, of every generation, in odd sizes."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 61

SIZES = {
    "vocab_size": VOCAB,
    "d_model": 40,
    "d_kv": 14,
    "d_ff": 37,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": 1e-5,
    "decoder_start_token_id": 0,
}
FLAN = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

CASES: dict[str, dict[str, Any]] = {
    "v1.0": SIZES,
    "v1.0-deep-decoder": {**SIZES, "num_layers": 1, "num_decoder_layers": 3, "relative_attention_num_buckets": 7},
    "v1.1": FLAN,
    "v1.1-head-tied": FLAN,  # as transformers 5 makes it from scratch
    "gated-silu": {**FLAN, "feed_forward_proj": "gated-silu"},
    "gelu": {**SIZES, "feed_forward_proj": "gelu"},
}


def make(case: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Write the case's checkpoint to `folder`; returns the `transformers` model, float32, in evaluation mode."""
    torch.manual_seed(seed)
    ids = {"eos_token_id": None, "pad_token_id": 0, **changes}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**CASES[case], **ids})).eval()
    if not model.config.scale_decoder_outputs and case != "v1.1-head-tied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 40) * 0.3)
        del model.all_tied_weights_keys["lm_head.weight"]
    with torch.no_grad():
        # As large as they are drawn, tied embeddings would repeat the last token for ever.
        model.shared.weight.mul_(0.03)
        for name, parameter in model.named_parameters():
            # The stock initialisation leaves norms at 1, where a mix-up would not show.
            parameter.add_(torch.randn_like(parameter) * (0.5 if "relative" in name else 0.25))
    model.save_pretrained(folder)
    return model


def as_on_the_hub(folder: Path) -> None:
    """Rewrite config.json the way `transformers` 4 wrote those of the published checkpoints."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
    for key in ("dense_act_fn", "is_gated_act", "is_decoder", "classifier_dropout", "dtype"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
