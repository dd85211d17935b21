"""Where a ViViT's weights begin (2103.15691, section 3.4): an image ViT, another ViViT, or itself at another size."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.checkpoint.hub import resolve
from modicum.checkpoint.image_vit import ImageVit, read_image_vit
from modicum.config import VivitConfig, nearest
from modicum.core.attention import Attention
from modicum.core.linear import refuse_training
from modicum.errors import UsageError
from modicum.vivit.load import assemble
from modicum.vivit.model import Vivit

Kernel = Literal["central_frame", "inflate"]
Temporal = Literal["zero_output", "zero_all", "copy"]


@torch.no_grad()
def init_from_image(
    model: Vivit,
    path: str | PathLike[str],
    kernel: Kernel = "central_frame",
    temporal: Temporal = "zero_output",
) -> Vivit:
    """Start a ViViT from an image ViT, in place: Hugging Face, timm, AugReg, big_vision or scenic.

    Copied are the patch embedding, the positions (repeated over time), the blocks and the last norm; a factorized encoder
    has them in its spatial encoder. The head and a temporal encoder stay as they are. A class token is copied with its
    position if both models have one; otherwise the model's own stays as it is, or the image's is left out. Positions of
    another grid are interpolated bilinearly, corner on corner. Grouped keys and values are the mean of the image's
    heads that they replace (2305.13245). The model keeps its own activation: ViTs with the exact GELU differ from its tanh
    form by less than 0.001 per unit.

    Args:
        path: a file or folder as in `checkpoint.image_vit.read_image_vit`, or a hub id.
        kernel: central_frame puts the image's filters at frame t // 2 of a tubelet and zeros elsewhere (equation 9);
            inflate spreads them over its t frames, divided by t (equation 8).
        temporal: how attention over time begins in a factorized_self_attention; in other variants it plays no part.
            zero_output: its output projection is zero, so that the model is the image model, frame by frame; queries,
            keys and values stay as they are. zero_all: all of it is zero, as in the paper; then nothing but the
            output's bias ever has a gradient. copy: as over space, the default of the authors' code. Its norm is the
            image's in each, which theirs leaves fresh.

    Returns:
        The model.

    Raises:
        CheckpointError: the image model cannot be read, or has parts that a ViViT has not.
        UsageError: its sizes differ from the model's, or the model is packed for inference.
    """
    for name, value, choices in (("kernel", kernel, Kernel), ("temporal", temporal, Temporal)):
        if value not in get_args(choices):
            raise UsageError(f"`{name}` is {value!r}{nearest(str(value), get_args(choices))}")
    refuse_training(model)
    local = Path(path).expanduser()
    image = read_image_vit(local if local.exists() else resolve(path if isinstance(path, Path) else str(path)))
    _check_image(image, model.config)
    state = {
        "embed.project.weight": _tubelet_filters(image.kernel, model.config.tubelet_size[0], kernel),
        "embed.project.bias": image.bias,
        **_image_blocks(image, model.config, temporal),
    }
    if image.class_token is not None:
        state["encoder.class_token"] = image.class_token
    shape = _grid("encoder.positions", model.config)
    table = _interpolated(image.positions[None], (1, *shape[1:])).expand(shape[0], -1, -1, -1)
    state["encoder.positions"] = _joined("encoder.positions", image.class_position, table, model)
    _copy(state, model)
    return model


@torch.no_grad()
def init_from_video(model: Vivit, source: Vivit) -> Vivit:
    """Start a ViViT from one that was trained for another task, in place: everything but the head is copied.

    Positions of another grid are interpolated, over space bilinearly and over time linearly, corner on corner. What only
    one of the two models has, a class token or the layer before the head, is left out or stays as it is. Grouped keys
    and values are the mean of the source's that they replace.

    Returns:
        The model.

    Raises:
        UsageError: the two differ in more than heads, pooling and sizes of input, or the model is packed for inference.
    """
    refuse_training(model)
    _check_same("the other ViViT", _body(source.config), _body(model.config))
    state = {name: tensor for name, tensor in source.dense_state().items() if not name.startswith("head.")}
    if source.config.pre_logits != model.config.pre_logits:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("pre_logits.")}
    for name in [name for name in state if name.endswith("positions")]:
        row, table = _parted(name, state[name], source.config)
        state[name] = _joined(name, row, _interpolated(table, _grid(name, model.config)), model)
    _copy(state, model)
    return model


@torch.no_grad()
def resize(model: Vivit, num_frames: int | None = None, image_size: int | tuple[int, int] | None = None) -> Vivit:
    """A copy of a model for clips of other numbers of frames or other sizes; the model itself stays as it is.

    Positions are interpolated, over space bilinearly and over time linearly, corner on corner (their grid's corners keep
    their values); class tokens keep theirs. Without a change all weights are equal.

    Args:
        num_frames: of the clips, None as before.
        image_size: a side, or (height, width), None as before.

    Raises:
        UsageError: a size that holds no tubelet.
    """
    changes: dict[str, Any] = {} if num_frames is None else {"num_frames": num_frames}
    if image_size is not None:
        changes["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = replace(model.config, **changes)
    state = model.dense_state()
    with torch.device("meta"):
        resized = Vivit(config)
    for name in [name for name in state if name.endswith("positions")]:
        row, table = _parted(name, state[name], model.config)
        state[name] = _joined(name, row, _interpolated(table, _grid(name, config)), resized)
    resized = assemble(config, state.items(), model.device, model.dtype).train(model.training)
    resized.stock_config, resized.files, resized.labels = model.stock_config, model.files, model.labels
    return resized


def _check_image(image: ImageVit, config: VivitConfig) -> None:
    given: dict[str, Any] = {name: getattr(image, name) for name in ("dim", "n_layers", "ffn_dim", "patch_size")}
    required: dict[str, Any] = {name: getattr(config, name) for name in ("dim", "n_layers", "ffn_dim")}
    required["patch_size"] = config.tubelet_size[1:]
    given["n_heads"], required["n_heads"] = image.n_heads or config.n_heads, config.n_heads
    inner = image.tensors["encoder.blocks.0.attention.project.q.weight"].shape[0]
    given["head_dim"], required["head_dim"] = inner // given["n_heads"], config.head_dim
    if image.activation is not None:
        # The two forms of GELU count as one.
        given["activation"], required["activation"] = (
            name.removesuffix("_tanh") for name in (image.activation, config.activation)
        )
    if not config.qkv_bias:
        biases = (t for name, t in image.tensors.items() if ".attention.project." in name and name.endswith("bias"))
        given["qkv_bias"], required["qkv_bias"] = any(bool(t.any()) for t in biases), False
    _check_same("the image ViT", given, required)


def _body(config: VivitConfig) -> dict[str, Any]:
    """What two models must share for one to start from the other; heads, pooling and sizes of input may differ."""
    names = (
        "variant tubelet_size dim n_layers n_heads head_dim ffn_dim qkv_bias activation attention_order temporal_layers"
    )
    return {name: getattr(config, name) for name in names.split()} | {
        "temporal_heads": config.temporal_heads or config.n_heads,
        "temporal_ffn_dim": config.temporal_ffn_dim or config.ffn_dim,
    }


def _check_same(what: str, given: dict[str, Any], required: dict[str, Any]) -> None:
    differing = [name for name in given if given[name] != required[name]]
    if differing:
        theirs, ours = (", ".join(f"{name} {values[name]}" for name in differing) for values in (given, required))
        raise UsageError(f"{what} has {theirs} and this ViViT {ours}: build this one to match, or start from another")


def _tubelet_filters(kernel: Tensor, t: int, method: Kernel) -> Tensor:
    """An image's filters [D, h, w, C] -> [D, t * h * w * C], for tubelets of t frames."""
    if method == "inflate":
        frames = (kernel / t)[:, None].expand(-1, t, -1, -1, -1)
    else:
        frames = torch.zeros_like(kernel)[:, None].repeat(1, t, 1, 1, 1)
        frames[:, t // 2] = kernel
    return frames.flatten(1)


def _image_blocks(image: ImageVit, config: VivitConfig, temporal: Temporal) -> dict[str, Tensor]:
    """The image's blocks and last norm, under the names that a model of this configuration has for them."""
    if config.variant != "factorized_self_attention":
        return image.tensors
    state = {}
    for name, tensor in image.tensors.items():
        state[name.replace(".attention", ".space")] = tensor
        over_time = name.replace(".attention", ".time")
        if ".attention_norm." in name or (".attention." in name and temporal == "copy"):
            state[over_time] = tensor
        elif ".attention.out." in name or (".attention." in name and temporal == "zero_all"):
            state[over_time] = torch.zeros_like(tensor)
    return state


def _grid(name: str, config: VivitConfig) -> tuple[int, int, int]:
    """How a table of positions is laid out over time, height and width."""
    T, height, width = config.grid
    if name == "temporal.positions":
        return T, 1, 1
    return (1 if config.variant == "factorized_encoder" else T), height, width


def _parted(name: str, positions: Tensor, config: VivitConfig) -> tuple[Tensor | None, Tensor]:
    """The class token's row, if there is one, and the others as [T, height, width, D]."""
    rows = positions.flatten(0, -2)
    token = config.pooling == "token"
    return rows[0] if token else None, rows[int(token) :].unflatten(0, _grid(name, config))


def _joined(name: str, row: Tensor | None, table: Tensor, model: Vivit) -> Tensor:
    """The reverse, in the shape that `model` has; its own row stands for one that the source has not."""
    own = model.get_parameter(name)
    rows = table.flatten(0, 2)
    if model.config.pooling == "token":
        rows = torch.cat([(own[0].to(rows) if row is None else row)[None], rows])
    return rows.reshape(own.shape)


def _interpolated(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[T, height, width, D] on another grid: linear along each axis, the first and last points staying in place."""
    if table.shape[:3] == grid:
        return table
    # In float64, as the authors' code does it.
    spread = F.interpolate(table.double().movedim(-1, 0)[None], grid, mode="trilinear", align_corners=True)
    return spread[0].movedim(0, -1).to(table.dtype)


def _copy(state: dict[str, Tensor], model: Vivit) -> None:
    """Write all tensors that the model has a place for, or, if one does not fit, none."""
    own = dict(model.named_parameters())
    fitted = {name: _grouped(name, tensor, model) for name, tensor in state.items() if name in own}
    for name, tensor in fitted.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"`{name}` is {list(tensor.shape)} there and {list(own[name].shape)} in this ViViT: build this one to "
                "match, or start from another"
            )
    for name, tensor in fitted.items():
        own[name].copy_(tensor)


def _grouped(name: str, tensor: Tensor, model: Vivit) -> Tensor:
    """Keys and values of fewer heads: the mean over those that the model groups together, others as they are."""
    attention, _, projection = name.rpartition(".project.")
    own = model.get_parameter(name)
    if projection[:2] not in ("k.", "v.") or tensor.shape[0] == own.shape[0]:
        return tensor
    owner = model.get_submodule(attention)
    assert isinstance(owner, Attention)
    head_dim = owner.head_dim
    given, groups = tensor.shape[0] // head_dim, own.shape[0] // head_dim
    if given % groups:
        raise UsageError(
            f"{given} key-value heads there do not form the {groups} groups of this ViViT: build this one with a "
            "divisor of them"
        )
    return tensor.unflatten(0, (groups, -1, head_dim)).float().mean(1).flatten(0, 1).to(tensor.dtype)
