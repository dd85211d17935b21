"""Image ViTs with random weights in the layouts that others write, of the sizes of `tiny.settings`: two layers of width 24
with 4 heads, a feed-forward of 31, patches of 5 x 7."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DIM, LAYERS, HEADS, FFN, PATCH = 24, 2, 4, 31, (5, 7)
_NAMES = {
    "hf4": {
        "attention.project.q": "attention.attention.query",
        "attention.project.k": "attention.attention.key",
        "attention.project.v": "attention.attention.value",
        "attention.out": "attention.output.dense",
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "ffn.project.up": "intermediate.dense",
        "ffn.down": "output.dense",
    },
    "hf5": {
        "attention.project.q": "attention.q_proj",
        "attention.project.k": "attention.k_proj",
        "attention.project.v": "attention.v_proj",
        "attention.out": "attention.o_proj",
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "ffn.project.up": "mlp.fc1",
        "ffn.down": "mlp.fc2",
    },
    "timm": {
        "attention.out": "attn.proj",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
        "ffn.project.up": "mlp.fc1",
        "ffn.down": "mlp.fc2",
    },
    "flax": {
        "attention.project.q": "MultiHeadDotProductAttention_0/query",
        "attention.project.k": "MultiHeadDotProductAttention_0/key",
        "attention.project.v": "MultiHeadDotProductAttention_0/value",
        "attention.out": "MultiHeadDotProductAttention_0/out",
        "attention_norm": "LayerNorm_0",
        "ffn_norm": "LayerNorm_1",
        "ffn.project.up": "MlpBlock_0/Dense_0",
        "ffn.down": "MlpBlock_0/Dense_1",
    },
}


def weights(seed: int = 0, grid: tuple[int, int] = (3, 3), *, token: bool = True) -> dict[str, Tensor]:
    """The tensors of an image ViT under our names; beside them `kernel` [D, height, width, 3], `bias`, `positions`
    [rows, columns, D] and, with a class token, `class_token` and `class_position`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2 + mean

    found = {"kernel": random(DIM, *PATCH, 3), "bias": random(DIM), "positions": random(*grid, DIM)}
    if token:
        found |= {"class_token": random(DIM), "class_position": random(DIM)}
    shapes = dict.fromkeys([f"attention.project.{x}" for x in "qkv"] + ["attention.out"], (DIM, DIM))
    shapes |= {"ffn.project.up": (FFN, DIM), "ffn.down": (DIM, FFN)}
    for i in range(LAYERS):
        for name, shape in shapes.items():
            found |= {f"encoder.blocks.{i}.{name}.weight": random(*shape)}
            found |= {f"encoder.blocks.{i}.{name}.bias": random(shape[0])}
        for name in ("attention_norm", "ffn_norm"):
            found[f"encoder.blocks.{i}.{name}.weight"] = random(DIM, mean=1)
            found[f"encoder.blocks.{i}.{name}.bias"] = random(DIM)
    return found | {"encoder.norm.weight": random(DIM, mean=1), "encoder.norm.bias": random(DIM)}


def _rows(found: dict[str, Tensor]) -> Tensor:
    rows = found["positions"].flatten(0, 1)
    if "class_position" in found:
        rows = torch.cat([found["class_position"][None], rows])
    return rows[None]


def hugging_face(found: dict[str, Tensor], version: int = 4, prefix: str = "") -> dict[str, Tensor]:
    layer = {4: "encoder.layer", 5: "layers"}[version]
    result = {
        "embeddings.patch_embeddings.projection.weight": found["kernel"].permute(0, 3, 1, 2),
        "embeddings.patch_embeddings.projection.bias": found["bias"],
        "embeddings.position_embeddings": _rows(found),
        "embeddings.cls_token": found["class_token"][None, None],
        "layernorm.weight": found["encoder.norm.weight"],
        "layernorm.bias": found["encoder.norm.bias"],
    }
    for name, tensor in found.items():
        if name.startswith("encoder.blocks."):
            _, _, i, *part, leaf = name.split(".")
            result[f"{layer}.{i}.{_NAMES[f'hf{version}']['.'.join(part)]}.{leaf}"] = tensor
    return {prefix + name: tensor for name, tensor in result.items()}


def hugging_face_config(grid: tuple[int, int] = (3, 3), **changes) -> dict:
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "patch_size": list(PATCH),
        "image_size": [grid[0] * PATCH[0] + 1, grid[1] * PATCH[1] + 1],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        **changes,
    }


def timm(found: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {
        "patch_embed.proj.weight": found["kernel"].permute(0, 3, 1, 2),
        "patch_embed.proj.bias": found["bias"],
        "pos_embed": _rows(found),
        "norm.weight": found["encoder.norm.weight"],
        "norm.bias": found["encoder.norm.bias"],
        "head.weight": torch.ones(3, DIM),
        "head.bias": torch.ones(3),
    }
    if "class_token" in found:
        result["cls_token"] = found["class_token"][None, None]
    for i in range(LAYERS):
        block = f"encoder.blocks.{i}"
        for leaf in ("weight", "bias"):
            fused = [found[f"{block}.attention.project.{x}.{leaf}"] for x in "qkv"]
            result[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(fused)
            for ours, theirs in _NAMES["timm"].items():
                result[f"blocks.{i}.{theirs}.{leaf}"] = found[f"{block}.{ours}.{leaf}"]
    return result


def flax(found: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Scenic's names, those of Linen."""
    result = {
        "embedding/kernel": found["kernel"].permute(1, 2, 3, 0),
        "embedding/bias": found["bias"],
        "Transformer/posembed_input/pos_embedding": _rows(found),
        "Transformer/encoder_norm/scale": found["encoder.norm.weight"],
        "Transformer/encoder_norm/bias": found["encoder.norm.bias"],
        "output_projection/kernel": torch.ones(DIM, 3),
        "output_projection/bias": torch.ones(3),
    }
    if "class_token" in found:
        result["cls"] = found["class_token"][None, None]
    for name, tensor in found.items():
        if not name.startswith("encoder.blocks."):
            continue
        _, _, i, *part, leaf = name.split(".")
        theirs = _NAMES["flax"][".".join(part)]
        if leaf == "weight":
            leaf = "scale" if part[-1].endswith("norm") else "kernel"
            tensor = tensor.T if leaf == "kernel" else tensor
        if part[:2] == ["attention", "project"]:
            tensor = tensor.unflatten(-1, (HEADS, -1))
        elif part == ["attention", "out"] and leaf == "kernel":
            tensor = tensor.unflatten(0, (HEADS, -1))
        result[f"Transformer/encoderblock_{i}/{theirs}/{leaf}"] = tensor
    return {name: tensor.contiguous().numpy() for name, tensor in result.items()}


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict, **files: dict) -> Path:
    """A folder with config.json, model.safetensors and other JSON files, as preprocessor_config={...}."""
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    for name, content in ({"config": config} | files).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def write_hugging_face(path: Path, found: dict[str, Tensor], **changes) -> Path:
    grid = (found["positions"].shape[0], found["positions"].shape[1])
    return write_folder(path, hugging_face(found, prefix="vit."), hugging_face_config(grid, **changes))
