"""A captioner out of what there is: any ViViT, and any native decoder-only language model."""

from dataclasses import replace
from typing import Any, Literal

import torch

from modicum.captioning.model import Captioner
from modicum.checkpoint.captioner_folder import TOKEN_IDS
from modicum.checkpoint.record import RECORD
from modicum.config import CaptionerConfig, with_dtype
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.vivit.model import Vivit


def from_parts(
    vivit: Vivit,
    decoder: Decoder,
    memory: Literal["frames", "patches"] = "frames",
    *,
    start_id: int | None = None,
    seed: int = 0,
) -> Captioner:
    """A captioner that begins as the two models do, in evaluation mode, on the decoder's device and in its dtype.

    What joins them is new. The output of each cross-attention is zero, so that it says nothing yet and the text is the
    language model's own, to the last bit; as only the outputs are, gradients reach everything after one step. In a
    parallel block (GPT-NeoX) cross-attention follows self-attention, and the feed-forward layer goes on reading beside both.

    Args:
        vivit: any variant; its head is left out, and with "patches" its temporal encoder too.
        decoder: from `load`, or fresh; its weights are copied.
        memory: what the decoder reads of a clip, see `CaptionerConfig`.
        start_id: what every caption begins with. The default is the language model's beginning of a text, or else its end.
        seed: of the new weights.

    Raises:
        UsageError: the text model has no decoder of ours, or no token to begin with.
    """
    if not isinstance(vivit, Vivit):
        raise UsageError(f"the encoder is {type(vivit).__name__}: give a ViViT")
    if not isinstance(decoder, Decoder):
        raise UsageError(
            f"the decoder is {type(decoder).__name__}: give a decoder-only language model of a family with native code"
        )
    dtype = name_of(decoder)
    temporal_layers = vivit.config.temporal_layers if memory == "frames" else 0
    config = CaptionerConfig(
        encoder=with_dtype(replace(vivit.config, temporal_layers=temporal_layers), dtype),
        decoder=with_dtype(decoder.config, dtype),
        memory=memory,
        decoder_start_id=beginning_of(decoder) if start_id is None else start_id,
    )
    return joined(config, {"encoder": vivit, "decoder": decoder}, decoder, seed)


def draft_of(target: Captioner, decoder: Decoder, seed: int = 0) -> Captioner:
    """A captioner that reads with the target's encoder and writes with a smaller decoder, to be trained as its draft.

    It begins as `from_parts` does. It holds no encoder but borrows the target's, so that what `save` writes is small.
    """
    dtype, theirs = name_of(decoder), target.config
    config = CaptionerConfig(
        encoder=with_dtype(theirs.encoder, dtype),
        decoder=with_dtype(decoder.config, dtype),
        memory=theirs.memory,
        decoder_start_id=theirs.decoder_start_id,
        shares_encoder=target.encoder_fingerprint,
    )
    return joined(config, {"decoder": decoder}, decoder, seed).share(target)


def name_of(decoder: Decoder) -> str:
    """What its weights are in."""
    return str(decoder.embed.weight.dtype).removeprefix("torch.")


@torch.no_grad()
def joined(config: CaptionerConfig, parts: dict[str, Any], decoder: Decoder, seed: int) -> Captioner:
    """A captioner with the weights of its parts, and with the decoder's tokens, files and place."""
    with torch.random.fork_rng(devices=[]):
        model = Captioner(config)
    begin(model, seed)
    wanted = model.state_dict()
    named = ((f"{part}.{name}", x) for part, source in parts.items() for name, x in source.dense_state().items())
    model.load_state_dict({name: tensor for name, tensor in named if name in wanted}, strict=False)
    model.stock_config = {key: value for key, value in (decoder.stock_config or {}).items() if key in TOKEN_IDS}
    if model.stock_config.get("eos_token_id") is None and decoder.eos_ids:
        model.stock_config["eos_token_id"] = sorted(decoder.eos_ids)
    model.tokenizer, model.eos_ids = decoder.tokenizer, decoder.eos_ids
    # What describes the language model, its card and how it was trained, does not describe this one.
    held = (decoder.files or {}).items()
    model.files = {name: content for name, content in held if name != RECORD and not name.endswith(".md")}
    return model.to(decoder.device, decoder.embed.weight.dtype).eval()


def begin(model: Captioner, seed: int) -> None:
    """Weights of what joins encoder and decoder: outputs zero, the rest so that unit inputs give unit outputs."""
    generator = torch.Generator().manual_seed(seed)
    new = [model.project, *(block.cross for block in model.blocks)]
    for part in new:
        for name, parameter in part.named_parameters():  # type: ignore[union-attr]
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    for block in model.blocks:
        block.cross.out.weight.zero_()  # type: ignore[union-attr, operator]


def beginning_of(decoder: Decoder) -> int:
    """The token that begins a text of this model's: of its config.json, of its tokenizer's template, or what ends one."""
    stated: Any = (decoder.stock_config or {}).get("bos_token_id")
    if isinstance(stated, int) and 0 <= stated < decoder.config.vocab_size:
        return stated
    added = [] if decoder.tokenizer is None else decoder.tokenizer.encode("")
    if added:
        return added[0]
    if decoder.eos_ids:
        return min(decoder.eos_ids)
    raise UsageError("the language model names no token that begins or ends a text: give one as `start_id`")
