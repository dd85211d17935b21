"""Image ViTs (2010.11929) in the layouts they are published in, as the single-frame encoder that a ViViT starts from."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from modicum.checkpoint.flax import flax_file, holds_flax, read_flax
from modicum.checkpoint.image_vit_names import PROJECTIONS, flax_tensors, torch_tensors
from modicum.checkpoint.io import CONFIG, WEIGHTS, SafetensorsFiles, read_checkpoint, read_json
from modicum.errors import CheckpointError

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_CHANNELS = 3
_NORMS, _LAYERS = ("attention_norm", "ffn_norm"), ("attention.out", "ffn.project.up", "ffn.down")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# timm's widths whose heads are not 64 wide.
_TIMM_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True, kw_only=True)
class ImageVit:
    """An image ViT without its head, as a ViViT of one frame.

    tensors: blocks and last norm under a ViViT's own names, `encoder.blocks.0.attention.project.q.weight` to
        `encoder.norm.bias`; weights are [out, in]. Projections that had no bias have one of zeros.
    kernel: [D, height, width, 3] and bias: [D], of the patch embedding, for pixels in [-1, 1].
    positions: [rows, columns, D], of the patches.
    class_token, class_position: [D], or None in a model that pools its patches.
    n_heads, norm_eps, activation: None where the checkpoint does not tell.
    """

    tensors: dict[str, Tensor]
    kernel: Tensor
    bias: Tensor
    positions: Tensor
    class_token: Tensor | None
    class_position: Tensor | None
    n_heads: int | None
    norm_eps: float | None = None
    activation: str | None = None

    @property
    def dim(self) -> int:
        return self.kernel.shape[0]

    @property
    def ffn_dim(self) -> int:
        return self.tensors["encoder.blocks.0.ffn.project.up.weight"].shape[0]

    @property
    def n_layers(self) -> int:
        return sum(name.endswith("ffn.down.bias") for name in self.tensors)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.kernel.shape[1], self.kernel.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        return self.positions.shape[0], self.positions.shape[1]


def read_image_vit(path: str | Path) -> ImageVit:
    """Read an image ViT; its layout is told by what is there, and its classifier, pooler or pooling head is left out.

    - a Hugging Face folder (ViTModel, ViTForImageClassification), or timm's folder or single safetensors file;
    - an `.npz` file of AugReg or big_vision;
    - a folder with a Flax checkpoint, or any other file: MessagePack, as scenic writes it.

    Where nothing states the image's size, its patches form a square. timm's files do not hold the number of heads: it is
    `num_heads` of the configuration's `model_args`, else that of timm's models of this width (64 wide up to 1024).
    An image processor's mean and deviation other than 1/2 are folded into the patch embedding.

    Raises:
        CheckpointError: it is missing or damaged, a pickle, or has parts that a ViViT has not.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not holds_flax(path):
        return _read_folder(path)
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if path.suffix == ".safetensors":
        return _from_torch(SafetensorsFiles([path]), path, {})
    raw, n_heads = flax_tensors(_read_npz(path) if path.suffix == ".npz" else read_flax(flax_file(path)), path)
    return _assemble(raw, path, None, n_heads, 1e-6, None)


def _read_folder(folder: Path) -> ImageVit:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    pickled = next((file for file in sorted(folder.iterdir()) if file.suffix in _PICKLES), None)
    # A Hugging Face folder's refusal, in `read_checkpoint`, names the class that converts it.
    if pickled and "model_type" not in config and not any(folder.glob("*.safetensors")):
        raise _pickle(pickled)
    checkpoint = read_checkpoint(folder)
    if "architecture" not in config and config.get("model_type") != "vit":
        raise CheckpointError(
            f'{folder} holds a model of type {config.get("model_type")!r}: give an image ViT, model_type "vit" from '
            "Hugging Face or a vit_* architecture from timm"
        )
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        checkpoint.config["preprocessor"] = read_json(processor)
    return _from_torch(checkpoint.state_dict, folder, checkpoint.config)


def _pickle(path: Path) -> CheckpointError:
    target = str(path.with_name(WEIGHTS))
    code = (
        "import torch, safetensors.torch as s; "
        f"w = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in w.items()}}, {target!r})"
    )
    return CheckpointError(
        f"{path} is a pickle, which can run code when read: convert it with: python -c {shlex.quote(code)}"
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            bare = not any(name.startswith("params/") for name in file.files)
            arrays = {name: file[name] for name in file.files if bare or name.startswith("params/")}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise CheckpointError(
            f"{path} is not an .npz file of plain arrays ({error}): give one, or download it again"
        ) from error
    return {name: _from_bfloat16(array) if array.dtype == "V2" else array for name, array in arrays.items()}


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
    """NumPy stores bfloat16, which it does not know, as two bytes without a meaning."""
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _from_torch(stored: Mapping[str, Tensor], path: Path, config: Mapping[str, Any]) -> ImageVit:
    raw = torch_tensors(stored, path)
    if "architecture" in config or not config:
        return _timm(raw, path, config)
    activation = config.get("hidden_act", "gelu")
    image = _assemble(
        raw,
        path,
        config.get("image_size", 224),
        config.get("num_attention_heads", 12),
        config.get("layer_norm_eps", 1e-12),
        _ACTIVATIONS.get(activation, activation),
    )
    processor = config.get("preprocessor", {})
    if not processor.get("do_normalize", True):
        return _normalised(image, [0.0] * _CHANNELS, [1.0] * _CHANNELS)
    return _normalised(image, processor.get("image_mean"), processor.get("image_std"))


def _timm(raw: dict[str, Tensor], path: Path, config: Mapping[str, Any]) -> ImageVit:
    settings, about = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    image_size = settings.get("img_size") or (about.get("input_size") or [None])[1:] or None
    dim = raw["encoder.norm.weight"].shape[0] if "encoder.norm.weight" in raw else 0
    n_heads = settings.get("num_heads") or _TIMM_HEADS.get(dim) or (None if dim % 64 else dim // 64)
    image = _assemble(raw, path, image_size, n_heads, 1e-6, "gelu")
    return _normalised(image, about.get("mean"), about.get("std"))


def _assemble(
    raw: dict[str, Tensor],
    path: Path,
    image_size: int | Sequence[int] | None,
    n_heads: int | None,
    norm_eps: float | None,
    activation: str | None,
) -> ImageVit:
    n_layers = len({name.split(".")[2] for name in raw if name.startswith("encoder.blocks.")})
    blocks = [f"encoder.blocks.{i}" for i in range(max(1, n_layers))]
    parts = [f"{block}.{part}" for block in blocks for part in (*_NORMS, *_LAYERS)]
    projections = [f"{block}.attention.project.{short}" for block in blocks for short in PROJECTIONS]
    needed = [f"{part}.{leaf}" for part in (*parts, "encoder.norm", "embed") for leaf in ("weight", "bias")]
    for name in (*needed, *(f"{part}.weight" for part in projections), "positions"):
        if name not in raw:
            raise CheckpointError(
                f"{path} has nothing for `{name}`: give a complete image ViT with learned positions, from "
                "Hugging Face, timm, big_vision or scenic"
            )
    for part in projections:
        raw.setdefault(f"{part}.bias", torch.zeros_like(raw[f"{part}.weight"][:, 0]))
    kernel, bias = raw.pop("embed.weight"), raw.pop("embed.bias")
    if kernel.dim() != 4 or kernel.shape[-1] != _CHANNELS:
        raise CheckpointError(
            f"{path} embeds what is no patch of {_CHANNELS} colours, its kernel is {list(kernel.shape)}: give an image ViT "
            "(a video checkpoint starts another model with `modicum.vivit.init_from_video`)"
        )
    dim = kernel.shape[0]
    token = raw.pop("class_token").reshape(dim) if "class_token" in raw else None
    rows = raw.pop("positions").reshape(-1, dim)
    grid = _grid(len(rows), token is not None, image_size, kernel, path)
    # Without a row of its own the class token is left as it is: the same as a row of zeros.
    own_row = len(rows) > math.prod(grid)
    row = None if token is None else rows[0] if own_row else torch.zeros_like(token)
    return ImageVit(
        tensors=raw,
        kernel=kernel,
        bias=bias,
        positions=rows[own_row:].reshape(*grid, dim),
        class_token=token,
        class_position=row,
        n_heads=n_heads,
        norm_eps=norm_eps,
        activation=activation,
    )


def _grid(
    n_rows: int, token: bool, image_size: int | Sequence[int] | None, kernel: Tensor, path: Path
) -> tuple[int, int]:
    """Rows and columns of patches, from the image's size if it is known; a class token may have a position or not."""
    counts = [n_rows - 1, n_rows] if token else [n_rows]
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = height // kernel.shape[1], width // kernel.shape[2]
        if math.prod(grid) in counts:
            return grid
    for count in counts:
        side = math.isqrt(count)
        if side and side * side == count:
            return side, side
    raise CheckpointError(
        f"{path} has {n_rows} positions, which fit neither its image size {image_size} nor a square: "
        "give an image ViT with one position per patch, in rows"
    )


def _normalised(image: ImageVit, mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageVit:
    """The same function of pixels v in [-1, 1], where the model was trained on ((v + 1) / 2 - mean) / std."""
    if mean is None or std is None or {*mean, *std} == {0.5}:
        return image
    scale = 0.5 / torch.tensor(std, dtype=torch.float64)
    offset = (0.5 - torch.tensor(mean, dtype=torch.float64)) * 2 * scale
    kernel = image.kernel.double()
    bias = image.bias.double() + (kernel * offset).sum((1, 2, 3))
    dtype = image.kernel.dtype
    return ImageVit(**{**vars(image), "kernel": (kernel * scale).to(dtype), "bias": bias.to(dtype)})
