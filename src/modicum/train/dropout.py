"""T5's dropout, for fine-tuning (1910.10683, section 3.1.2): hung onto a model from outside, so that the core has none."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modicum.core.attend import folded
from modicum.core.attention import Attention
from modicum.core.block import FeedForward
from modicum.lm.encoder_decoder import EncoderDecoder


def add_dropout(model: EncoderDecoder, rate: float) -> None:
    """While `model` is in training mode, drop shares of: the embedded tokens, attention weights, what a feed-forward layer
    holds inside, what each layer adds to its input, and what the encoder and the decoder hand on.

    It draws from PyTorch's global generator.
    """

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, rate, model.training)

    def drop_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return drop(output)

    def drop_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return drop(args[0])

    def attend(q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Any, causal: bool, scale: Any) -> Tensor:
        if not model.training:
            return folded(q_BHLK, k_BGMK, v_BGMK, mask, causal, scale)
        grouped = q_BHLK.shape[1] != k_BGMK.shape[1]
        return F.scaled_dot_product_attention(
            q_BHLK, k_BGMK, v_BGMK, mask, rate, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    for module in (model.embed, model.encoder.norm, model.decoder.norm):
        module.register_forward_hook(drop_output)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
            module.out.register_forward_hook(drop_output)
        elif isinstance(module, FeedForward):
            module.down.register_forward_pre_hook(drop_input)
            module.down.register_forward_hook(drop_output)
