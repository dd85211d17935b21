"""What a language model is trained to do: predict the text, or what a teacher would predict."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_lm_loss(model: Any, tokens_BL: Tensor, teacher: Any = None, weight: float = 0.0) -> Tensor:
    """Mean nats per token, of windows int64 [B, L + 1].

    With a teacher: weight * KL(teacher || model) + (1 - weight) * cross-entropy (1503.02531, at temperature 1, which
    is what speculative sampling accepts by).
    """
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    logits_BLV = model(inputs_BL).float()
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted_BLV = teacher(inputs_BL).float().log_softmax(-1)
    distance = F.kl_div(
        logits_BLV.log_softmax(-1).flatten(0, 1), wanted_BLV.flatten(0, 1), reduction="batchmean", log_target=True
    )
    return weight * distance + (1 - weight) * loss
