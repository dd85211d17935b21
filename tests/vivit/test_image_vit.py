"""Image ViTs are read from the layouts they are published in, and what a ViViT cannot hold is refused by name."""

import pickle
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from modicum.checkpoint.image_vit import read_image_vit
from modicum.errors import CheckpointError
from tests.vivit.image_files import (
    DIM,
    HEADS,
    LAYERS,
    PATCH,
    flax,
    hugging_face,
    hugging_face_config,
    timm,
    weights,
    write_folder,
)
from tests.vivit.scenic_files import before_linen, nested, write_flax

TIMM = {"architecture": "vit_tiny_patch5", "model_args": {"num_heads": HEADS, "img_size": [17, 22]}}


def assert_read(path, expected):
    """Everything that `weights` made is found in the checkpoint, bit for bit."""
    image = read_image_vit(path)
    blocks = {name: tensor for name, tensor in expected.items() if name.startswith("encoder.")}
    assert image.tensors.keys() == blocks.keys()
    for name, tensor in blocks.items():
        assert torch.equal(image.tensors[name], tensor), name
    for name in ("kernel", "bias", "positions"):
        assert torch.equal(getattr(image, name), expected[name]), name
    for name in ("class_token", "class_position"):
        found, wanted = getattr(image, name), expected.get(name)
        assert (found is None) == (wanted is None), name
        assert wanted is None or torch.equal(found, wanted), name
    assert (image.dim, image.n_layers, image.ffn_dim) == (24, 2, 31)
    assert image.patch_size == (5, 7)
    return image


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face_folders(tmp_path, version, prefix):
    expected = weights(grid=(3, 2))
    heads = {"pooler.dense.weight": torch.ones(DIM, DIM), "classifier.bias": torch.ones(3)}
    tensors = hugging_face(expected, version, prefix) | heads
    image = assert_read(write_folder(tmp_path / "vit", tensors, hugging_face_config((3, 2))), expected)
    assert (image.n_heads, image.norm_eps, image.activation, image.grid) == (4, 1e-12, "gelu", (3, 2))


def test_timm_folder(tmp_path):
    expected = weights(grid=(3, 3))
    image = assert_read(write_folder(tmp_path / "timm", timm(expected), TIMM), expected)
    assert (image.n_heads, image.norm_eps, image.activation) == (4, 1e-6, "gelu")


def test_timm_grid_comes_from_the_input_size(tmp_path):
    expected = weights(grid=(3, 2))
    config = {"architecture": "vit_tiny_patch5", "pretrained_cfg": {"input_size": [3, 15, 14]}}
    assert assert_read(write_folder(tmp_path / "timm", timm(expected), config), expected).grid == (3, 2)


def test_timm_file_alone(tmp_path):
    expected = weights()
    save_file({k: v.contiguous() for k, v in timm(expected).items()}, tmp_path / "vit.safetensors")
    assert assert_read(tmp_path / "vit.safetensors", expected).n_heads is None


@pytest.mark.parametrize(("dim", "n_heads"), [(192, 3), (768, 12), (1280, 16), (100, None)])
def test_timm_heads_follow_the_width(tmp_path, dim, n_heads):
    tensors = {
        "patch_embed.proj.weight": torch.zeros(dim, 3, 1, 1),
        "pos_embed": torch.zeros(1, 4, dim),
        "norm.weight": torch.zeros(dim),
        "blocks.0.attn.qkv.weight": torch.zeros(3 * dim, 1),
        "blocks.0.attn.proj.weight": torch.zeros(dim, 1),
        "blocks.0.mlp.fc1.weight": torch.zeros(7, 1),
        "blocks.0.mlp.fc2.weight": torch.zeros(dim, 1),
    }
    for name in (
        "patch_embed.proj",
        "norm",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc2",
        "blocks.0.norm1",
        "blocks.0.norm2",
    ):
        tensors[f"{name}.bias"] = torch.zeros(dim)
    tensors |= {f"blocks.0.norm{i}.weight": torch.zeros(dim) for i in (1, 2)} | {
        "blocks.0.mlp.fc1.bias": torch.zeros(7)
    }
    save_file(tensors, tmp_path / "vit.safetensors")
    assert read_image_vit(tmp_path / "vit.safetensors").n_heads == n_heads


def test_timm_model_that_pools_norms_its_average(tmp_path):
    expected = weights(token=False)
    tensors = {
        name.replace("norm.", "fc_norm.") if name[:5] == "norm." else name: t for name, t in timm(expected).items()
    }
    assert "fc_norm.weight" in tensors
    assert_read(write_folder(tmp_path / "timm", tensors, TIMM), expected)


def test_class_token_without_a_position_has_zeros(tmp_path):
    expected = weights()
    tensors = timm(expected)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    expected["class_position"] = torch.zeros(DIM)
    assert_read(write_folder(tmp_path / "timm", tensors, TIMM), expected)


def test_fused_projection_is_read_in_the_order_it_is_used(tmp_path):
    """A forward pass written as timm's equals one with the tensors that were read: attention of the first block."""
    found = timm(weights())
    image = read_image_vit(write_folder(tmp_path / "timm", found, TIMM))
    x_BLD = torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(3))
    fused = F.linear(x_BLD, found["blocks.0.attn.qkv.weight"], found["blocks.0.attn.qkv.bias"])
    theirs = fused.reshape(2, 10, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    for name, wanted in zip("qkv", theirs, strict=True):
        part = f"encoder.blocks.0.attention.project.{name}"
        ours = F.linear(x_BLD, image.tensors[f"{part}.weight"], image.tensors[f"{part}.bias"])
        torch.testing.assert_close(ours.reshape(2, 10, HEADS, -1).transpose(1, 2), wanted)


def augreg(arrays):
    """Names from before Linen, with what is left of pretraining."""
    return {before_linen(name): array for name, array in arrays.items()} | {"pre_logits/bias": np.ones(3)}


def big_vision(arrays):
    """Parameters beside an optimizer's state; positions at the top, which the class token has none of."""
    named = {name.replace("Transformer/posembed_input/", ""): array for name, array in arrays.items()}
    named["MAPHead_0/probe"] = np.ones((1, 1, DIM))
    return {f"params/{name}": array for name, array in named.items()} | {"opt/0/count": np.array(3)}


def two_towers(arrays):
    towers = {f"img/{name}": array for name, array in arrays.items()} | {"txt/Embed_0/embedding": np.ones((5, 2))}
    return {f"params/{name}": array for name, array in (towers | {"t": np.ones(1)}).items()}


def scanned(arrays):
    """All layers of a kind in one array."""
    result = {}
    for name, array in arrays.items():
        if "encoderblock_0" in name:
            layers = [arrays[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(LAYERS)]
            result[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
        elif "encoderblock" not in name:
            result[name] = array
    return big_vision(result)


@pytest.mark.parametrize("layout", [dict, augreg, big_vision, two_towers, scanned])
@pytest.mark.parametrize("token", [True, False])
def test_npz_files(tmp_path, layout, token):
    expected = weights(token=token)
    np.savez(tmp_path / "vit.npz", **layout(flax(expected)))
    assert assert_read(tmp_path / "vit.npz", expected).n_heads == 4


def test_npz_in_bfloat16(tmp_path):
    expected = {name: tensor.bfloat16().float() for name, tensor in weights().items()}
    halves = {
        name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in flax(expected).items()
    }
    np.savez(tmp_path / "vit.npz", **halves)
    assert_read(tmp_path / "vit.npz", expected)


@pytest.mark.parametrize("where", ["checkpoint_120", "vit.msgpack", "folder"])
def test_scenic_files(tmp_path, where):
    expected = weights()
    file = tmp_path / (where if where != "folder" else "checkpoint_7")
    write_flax(file, {"optimizer": {"target": nested(flax(expected))}})
    assert assert_read(tmp_path if where == "folder" else file, expected).n_heads == 4


def test_projections_without_biases_get_zeros(tmp_path):
    expected = weights()
    tensors = hugging_face(expected)
    for name in [name for name in tensors if re.search("(query|key|value).bias", name)]:
        del tensors[name]
    for name in [name for name in expected if ".project." in name and ".attention." in name and name[-4:] == "bias"]:
        expected[name] = torch.zeros(DIM)
    assert_read(write_folder(tmp_path / "vit", tensors, hugging_face_config(qkv_bias=False)), expected)


@pytest.mark.parametrize("layout", ["hugging_face", "timm"])
def test_pixels_that_were_normalised_otherwise(tmp_path, layout):
    """The embedding of a pixel in [-1, 1] is that of the same pixel as the model was trained on it."""
    expected, mean, std = weights(), [0.1, 0.3, 0.7], [0.2, 0.25, 0.4]
    if layout == "timm":
        about = {"pretrained_cfg": {"mean": mean, "std": std, "input_size": [3, 15, 21]}}
        path = write_folder(tmp_path / "vit", timm(expected), TIMM | about)
    else:
        processor = {"image_mean": mean, "image_std": std}
        path = write_folder(
            tmp_path / "vit", hugging_face(expected), hugging_face_config(), preprocessor_config=processor
        )
    image = read_image_vit(path)
    patch = torch.rand(*PATCH, 3, generator=torch.Generator().manual_seed(4))
    as_trained = (patch - torch.tensor(mean)) / torch.tensor(std)
    wanted = (expected["kernel"] * as_trained).sum((1, 2, 3)) + expected["bias"]
    found = (image.kernel * (2 * patch - 1)).sum((1, 2, 3)) + image.bias
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Read as if the model had seen [-1, 1], the same patch gives something else.
    plain = (expected["kernel"] * (2 * patch - 1)).sum((1, 2, 3)) + expected["bias"]
    assert (plain - wanted).abs().max() > 1


def test_pixels_that_were_not_normalised(tmp_path):
    expected = weights()
    files = {"preprocessor_config": {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    image = read_image_vit(write_folder(tmp_path / "vit", hugging_face(expected), hugging_face_config(), **files))
    torch.testing.assert_close(image.kernel, expected["kernel"] / 2)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.ls1.gamma",
        "dist_token",
        "reg_token",
        "blocks.1.attn.q_norm.weight",
        "blocks.0.mlp.fc1_g.weight",
        "norm_pre.weight",
    ],
)
def test_parts_that_a_vivit_has_not_are_refused_by_name(tmp_path, name):
    tensors = timm(weights()) | {name: torch.ones(DIM)}
    with pytest.raises(CheckpointError, match=f"holds `{re.escape(name)}`, which has no counterpart"):
        read_image_vit(write_folder(tmp_path / "vit", tensors, TIMM))


def test_two_last_norms_are_refused(tmp_path):
    tensors = timm(weights()) | {"fc_norm.weight": torch.ones(DIM)}
    with pytest.raises(CheckpointError, match="norm.weight`, which has no counterpart"):
        read_image_vit(write_folder(tmp_path / "vit", tensors, TIMM))


def test_other_models_are_refused(tmp_path):
    folder = write_folder(tmp_path / "vit", hugging_face(weights()), hugging_face_config(model_type="deit"))
    with pytest.raises(CheckpointError, match="type 'deit': give an image ViT"):
        read_image_vit(folder)


def test_video_checkpoints_are_refused(tmp_path):
    arrays = flax(weights())
    arrays["embedding/kernel"] = np.zeros((2, *PATCH, 3, DIM), np.float32)
    write_flax(tmp_path / "vivit.msgpack", {"params": nested(arrays)})
    with pytest.raises(CheckpointError, match=r"kernel is \[24, 2, 5, 7, 3\]: give an image ViT .*init_from_video"):
        read_image_vit(tmp_path / "vivit.msgpack")


@pytest.mark.parametrize(
    "name",
    [
        "encoder_norm/scale",
        "encoderblock_1/LayerNorm_1/bias",
        "encoderblock_1/MultiHeadDotProductAttention_0/key/kernel",
        "posembed_input/pos_embedding",
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path, name):
    arrays = flax(weights())
    del arrays[f"Transformer/{name}"]
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(CheckpointError, match="has nothing for `"):
        read_image_vit(tmp_path / "vit.npz")


def test_positions_that_fit_no_grid_are_refused(tmp_path):
    np.savez(tmp_path / "vit.npz", **flax(weights(grid=(3, 2))))
    with pytest.raises(CheckpointError, match="7 positions, which fit neither"):
        read_image_vit(tmp_path / "vit.npz")


def test_grey_images_are_refused(tmp_path):
    tensors = timm(weights())
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"][:, :1]
    with pytest.raises(CheckpointError, match=r"no patch of 3 colours, its kernel is \[24, 5, 7, 1\]"):
        read_image_vit(write_folder(tmp_path / "vit", tensors, TIMM))


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_refused_with_what_converts_them(tmp_path):
    for name in ("vit.pth", "vit.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Boom()))
        with pytest.raises(CheckpointError, match=r"is a pickle.*python -c .*weights_only=True"):
            read_image_vit(tmp_path / name)
    folder = write_folder(tmp_path / "timm", timm(weights()), TIMM)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*weights_only=True"):
        read_image_vit(folder)
    folder = write_folder(tmp_path / "hf", hugging_face(weights()), hugging_face_config())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles only.*t.ViTForImageClassification.from_pretrained"):
        read_image_vit(folder)


def test_the_command_that_converts_a_pickle_works(tmp_path):
    expected = weights()
    torch.save(timm(expected), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError) as refusal:
        read_image_vit(tmp_path / "vit.pth")
    code = re.search(r"python -c ('.*')$", str(refusal.value))[1]
    exec(shlex.split(code)[0], {})
    assert_read(tmp_path / "model.safetensors", expected)


def test_damaged_npz_files_are_refused(tmp_path):
    np.savez(tmp_path / "vit.npz", a=np.array([Boom()], dtype=object))
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("vit.npz", "text.npz", "empty.npz", "missing.npz"):
        with pytest.raises(CheckpointError, match="is not an .npz file of plain arrays"):
            read_image_vit(tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_image_vit(tmp_path / "missing")
