"""A ViViT starts from an image model (2103.15691, section 3.4), from another ViViT, or from itself at another size."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modicum
from modicum.checkpoint.flax import flax_parameters, read_flax
from modicum.config import VivitConfig
from modicum.errors import CheckpointError, UsageError
from modicum.vivit import init_from_image, init_from_video, resize
from modicum.vivit.model import Vivit
from tests.vivit.image_files import (
    PATCH,
    flax,
    hugging_face,
    hugging_face_config,
    weights,
    write_folder,
    write_hugging_face,
)
from tests.vivit.scenic_files import equal_weights, scenic_parameters
from tests.vivit.tiny import KINDS, M1, M2, M3, M4, MODELS, clip, name_of, tiny_vivit

FIXTURES = Path(__file__).parent / "fixtures" / "images"
CASES = json.loads((FIXTURES / "cases.json").read_text())
GRID = (7, 3)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An image ViT of the grid that `tiny_vivit` has, as a folder and as its tensors."""
    found = weights(seed=5, grid=GRID)
    return write_hugging_face(tmp_path_factory.mktemp("image") / "vit", found), found


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- what the authors' own code computes ---


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_authors_code(case):
    c, expected = CASES[case], np.load(FIXTURES / "expected.npz")
    config = VivitConfig(
        variant=c["variant"], pooling=c["pooling"], temporal_layers=c["temporal_layers"], image_size=(32, 32),
        num_frames=8, tubelet_size=(2, 8, 8), dim=48, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=12, ffn_dim=96,
        num_classes=5,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Vivit(config)
    torch.nn.init.normal_(model.head.weight)
    before = {name: array.copy() for name, array in scenic_parameters(model).items()}
    temporal = "copy" if case.endswith("copy_both") else "zero_all"
    file = FIXTURES / c["image"]
    assert init_from_image(model, file, kernel=c["kernel"], temporal=temporal) is model
    after, theirs = scenic_parameters(model), flax_parameters(read_flax(file))
    for name, source in c["copied"].items():
        assert np.array_equal(after[name], theirs[source]), name
    computed = {name.split(":")[1]: expected[name] for name in expected.files if name.split(":")[0] == case}
    for name, wanted in computed.items():
        # Not a number marks the row of a class token that stays as it was.
        fresh = np.isnan(wanted)
        np.testing.assert_allclose(after[name][~fresh], wanted[~fresh], rtol=0, atol=1e-7, err_msg=name)
        assert np.array_equal(after[name][fresh], before[name][fresh])
    for name in c["fresh"]:
        # Theirs leaves these out: the class token of Model 2 for its name alone, and Model 3 over time as it was built.
        if name != "cls_SpatialTransformer" and "LayerNorm_time" not in name and "Attention_time" not in name:
            assert np.array_equal(after[name], before[name]), name
    assert {*c["copied"], *computed, *c["fresh"], "embedding/kernel"} == {*after}


# --- the same function as the image model ---


def transformers_vit(folder, **changes):
    """The image ViT as `transformers` runs it, with a ViViT's epsilon and activation."""
    transformers = pytest.importorskip("transformers")
    settings = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, **settings).eval()


def frames_as_images(video):
    return video.movedim(-1, -3)


@torch.no_grad()
def test_frame_vectors_of_a_factorized_encoder_are_the_image_models(image):
    model = init_from_image(tiny_vivit(**MODELS[1]), image[0])
    video = clip()
    wanted = transformers_vit(image[0])(frames_as_images(video[:, 1:9:3]).flatten(0, 1)).last_hidden_state
    found = model(video, features=True)
    torch.testing.assert_close(found.frames.flatten(0, 1), wanted[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches.flatten(0, 1), wanted[:, 1:], rtol=0, atol=1e-5)
    exact = transformers_vit(image[0], hidden_act="gelu")(frames_as_images(video[:, 1])).last_hidden_state
    assert 1e-5 < (found.frames[:, 0] - exact[:, 0]).abs().max() < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"variant": M1}, {"variant": M1, "pooling": "gap"}])
def test_model_1_on_one_tubelet_is_the_image_model(image, changes):
    """The image's class token and its row are left out in a model that pools, so there only the tokens are compared."""
    model = init_from_image(tiny_vivit(**changes, num_frames=3), image[0])
    video = clip(frames=3)
    found = model(video, features=True)
    vit = transformers_vit(image[0])
    if changes.get("pooling"):
        first = vit.embeddings(frames_as_images(video[:, 1]))[:, 1:]
        torch.testing.assert_close(model.embed(video)[:, 0] + model.encoder.positions, first, rtol=0, atol=1e-5)
    else:
        wanted = vit(frames_as_images(video[:, 1])).last_hidden_state
        torch.testing.assert_close(found.clip, wanted[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.patches[:, 0], wanted[:, 1:], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_central_frame_embeds_frame_t_over_2(image, t):
    """Equation 9: a tubelet's token is the image model's of one of its frames."""
    model = init_from_image(tiny_vivit(variant=M1, tubelet_size=(t, *PATCH)), image[0])
    video = clip()
    tokens = model.embed(video)
    kernel, bias = image[1]["kernel"].permute(0, 3, 1, 2), image[1]["bias"]
    for i in range(11 // t):
        frame = frames_as_images(video[:, i * t + t // 2])
        wanted = F.conv2d(frame, kernel, bias, stride=PATCH).flatten(2).mT
        torch.testing.assert_close(tokens[:, i], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_inflation_embeds_a_still_clip_as_the_image(image):
    still = clip()[:, :1].expand(-1, 11, -1, -1, -1)
    kernel, bias = image[1]["kernel"].permute(0, 3, 1, 2), image[1]["bias"]
    wanted = F.conv2d(frames_as_images(still[:, 0]), kernel, bias, stride=PATCH).flatten(2).mT
    model = init_from_image(tiny_vivit(variant=M1), image[0], kernel="inflate")
    for i in range(3):
        torch.testing.assert_close(model.embed(still)[:, i], wanted, rtol=0, atol=1e-5)
    # What moves is averaged (equation 8).
    video = clip()
    each = [F.conv2d(frames_as_images(video[:, i]), kernel, bias, stride=PATCH).flatten(2).mT for i in range(3)]
    torch.testing.assert_close(model.embed(video)[:, 0], torch.stack(each).mean(0), rtol=0, atol=1e-5)


# --- what is copied where ---


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_positions_are_repeated_over_time(image, kind):
    model = init_from_image(tiny_vivit(**kind), image[0])
    table = image[1]["positions"].flatten(0, 1)
    found = model.encoder.positions.detach()
    if model.config.pooling == "token":
        assert torch.equal(found[0], image[1]["class_position"])
        assert torch.equal(model.encoder.class_token.detach(), image[1]["class_token"])
        found = found[1:]
    frames = 1 if model.config.variant == M2 else 3
    assert found.shape[-1] == 24
    assert torch.equal(found.reshape(frames, 21, 24), table.expand(frames, -1, -1))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_head_and_temporal_encoder_stay_as_they_are(image, kind):
    model = tiny_vivit(**kind)
    before = state(model)
    after = state(init_from_image(model, image[0]))
    kept = {name for name in before if name.startswith(("head.", "temporal.")) or ".time.project." in name}
    assert {name for name in before if torch.equal(before[name], after[name])} == kept
    assert ("temporal.norm.weight" in kept) == bool(kind.get("temporal_layers"))


def test_pooled_image_model_leaves_the_class_token_as_it_was(tmp_path):
    found = weights(token=False)
    np.savez(tmp_path / "vit.npz", **flax(found))
    for kind in (MODELS[0], MODELS[1]):
        model = tiny_vivit(**kind)
        before = state(model)
        after = state(init_from_image(model, tmp_path / "vit.npz"))
        assert torch.equal(after["encoder.class_token"], before["encoder.class_token"])
        assert torch.equal(after["encoder.positions"][0], before["encoder.positions"][0])
        assert not torch.equal(after["encoder.positions"][1:], before["encoder.positions"][1:])


def test_positions_of_another_grid_are_interpolated(tmp_path):
    """3 x 3 on 7 x 3: rows at 0, 1/3, 2/3, 1, 4/3, ... of the image's, columns in place."""
    found = weights(grid=(3, 3))
    model = init_from_image(tiny_vivit(**MODELS[1]), write_hugging_face(tmp_path / "vit", found))
    positions = model.encoder.positions.detach()[1:].reshape(7, 3, 24)
    source = found["positions"]
    for row, (below, share) in enumerate([(0, 0), (0, 1 / 3), (0, 2 / 3), (1, 0), (1, 1 / 3), (1, 2 / 3), (2, 0)]):
        above = source[min(below + 1, 2)]
        torch.testing.assert_close(positions[row], source[below] * (1 - share) + above * share, rtol=0, atol=1e-6)


def test_grouped_heads_are_the_mean_of_those_they_replace(image):
    model = init_from_image(tiny_vivit(variant=M1, n_kv_heads=2), image[0])
    for name in ("k", "v"):
        for leaf in ("weight", "bias"):
            part = f"encoder.blocks.1.attention.project.{name}.{leaf}"
            heads = image[1][part].unflatten(0, (4, 6))
            wanted = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
            torch.testing.assert_close(model.state_dict()[part], wanted, rtol=0, atol=1e-7)
    part = "encoder.blocks.1.attention.project.q.weight"
    assert torch.equal(model.state_dict()[part], image[1][part])


# --- attention over time in Model 3 ---


@torch.no_grad()
@pytest.mark.parametrize("temporal", ["zero_output", "zero_all", "copy"])
@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_model_3_begins_as_the_image_model_of_each_frame(image, temporal, order):
    """Equation 5 adds nothing at first; `copy`, which does, shows that the comparison can fail."""
    model = init_from_image(tiny_vivit(variant=M3, pooling="gap", attention_order=order), image[0], temporal=temporal)
    spatial = init_from_image(tiny_vivit(variant=M2, pooling="gap"), image[0])
    found, wanted = (m(clip(), features=True).patches for m in (model, spatial))
    difference = (found - wanted).abs().max()
    assert difference > 0.05 if temporal == "copy" else difference < 2e-6


def trained(model, steps=20):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(clip(batch=3, seed=step)), torch.tensor([2, 5, 11]))
        loss.backward()
        optimizer.step()


def over_time(model):
    return {name: tensor for name, tensor in state(model).items() if ".time." in name}


def test_zeroed_output_learns_and_zeroed_everything_does_not(image):
    """With all weights zero, keys, values and output multiply zeros: their gradients are exactly zero for ever."""
    model = init_from_image(tiny_vivit(variant=M3, pooling="gap"), image[0], temporal="zero_all")
    trained(model)
    after = over_time(model)
    moved = {name.split(".time.")[1] for name, tensor in after.items() if tensor.abs().max() > 0}
    assert len(after) == 16
    assert moved == {"out.bias"}

    model = init_from_image(tiny_vivit(variant=M3, pooling="gap"), image[0])
    before = over_time(model)
    assert all(before[name].abs().max() == 0 for name in before if ".out." in name)
    trained(model)
    after = over_time(model)
    # Softmax does not see what is added to all scores, so the gradient of a key's bias is rounding alone.
    for name in before:
        if "k.bias" not in name:
            assert (after[name] - before[name]).abs().max() > 1e-5, name


def test_projections_over_time_are_fresh_zero_or_the_images(image):
    """The output's bias too is zero where its weight is: otherwise it would add to every token."""
    for temporal in ("zero_output", "zero_all", "copy"):
        model = tiny_vivit(variant=M3, pooling="gap")
        fresh = over_time(model)
        after = over_time(init_from_image(model, image[0], temporal=temporal))
        for name, tensor in after.items():
            copied = image[1][name.replace(".time.", ".attention.")]
            zero = torch.zeros_like(copied)
            first = fresh[name] if ".out." not in name else zero
            assert torch.equal(tensor, {"zero_output": first, "zero_all": zero, "copy": copied}[temporal]), name


def test_norm_over_time_is_the_images(image):
    for temporal in ("zero_output", "zero_all", "copy"):
        model = init_from_image(tiny_vivit(variant=M3, pooling="gap"), image[0], temporal=temporal)
        found = state(model)
        for leaf in ("weight", "bias"):
            wanted = image[1][f"encoder.blocks.1.attention_norm.{leaf}"]
            assert torch.equal(found[f"encoder.blocks.1.time_norm.{leaf}"], wanted)
            assert torch.equal(found[f"encoder.blocks.1.space_norm.{leaf}"], wanted)


# --- from a video model ---


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_another_task_starts_from_everything_but_the_head(kind):
    source, model = tiny_vivit(1, **kind), tiny_vivit(2, **{**kind, "num_classes": 17})
    before, theirs = state(model), state(source)
    assert init_from_video(model, source) is model
    after = state(model)
    for name in after:
        assert torch.equal(after[name], (before if name.startswith("head.") else theirs)[name]), name
    assert equal_weights(source, tiny_vivit(1, **kind))


def test_video_positions_of_another_size_are_interpolated():
    source = tiny_vivit(1, **MODELS[1])
    model = tiny_vivit(2, **MODELS[1], num_frames=15, image_size=(66, 36), tubelet_size=(3, 5, 7))
    init_from_video(model, source)
    # Grids of 3 x 7 x 3 and 5 x 13 x 5: every second point is one of the source's.
    time = model.temporal.positions.detach()
    assert torch.equal(time[0], source.temporal.positions[0])
    torch.testing.assert_close(time[1::2], source.temporal.positions.detach()[1:], rtol=0, atol=1e-7)
    between = (source.temporal.positions.detach()[1] + source.temporal.positions.detach()[2]) / 2
    torch.testing.assert_close(time[2], between, rtol=0, atol=1e-7)
    space = model.encoder.positions.detach()[1:].reshape(13, 5, 24)
    wanted = source.encoder.positions.detach()[1:].reshape(7, 3, 24)
    torch.testing.assert_close(space[::2, ::2], wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", [MODELS[0], MODELS[1]], ids=name_of)
def test_class_token_that_only_one_video_model_has(kind):
    with_token, pooled = tiny_vivit(1, **kind), tiny_vivit(2, **{**kind, "pooling": "gap"})
    encoders = ["encoder"] + ["temporal"] * bool(kind.get("temporal_layers"))
    init_from_video(pooled, with_token)
    for name in encoders:
        ours, theirs = pooled.get_submodule(name), with_token.get_submodule(name)
        assert torch.equal(ours.positions, theirs.positions[1:])
    source = tiny_vivit(3, **{**kind, "pooling": "gap"})
    before = state(with_token)
    init_from_video(with_token, source)
    for name in encoders:
        ours, theirs = with_token.get_submodule(name), source.get_submodule(name)
        assert torch.equal(ours.positions[1:], theirs.positions)
        assert torch.equal(ours.positions[0], before[f"{name}.positions"][0])
        assert torch.equal(ours.class_token, before[f"{name}.class_token"])


def test_layer_before_the_head_is_copied_where_both_have_it():
    kind = {"variant": M1, "pre_logits": 19}
    source = tiny_vivit(1, **kind)
    both = init_from_video(tiny_vivit(2, **kind), source)
    assert torch.equal(both.pre_logits.weight, source.pre_logits.weight)
    for changes in ({"variant": M1}, {"variant": M1, "pre_logits": 9}):
        model = init_from_video(tiny_vivit(2, **changes), source)
        assert torch.equal(model.embed.project.weight, source.embed.project.weight)
        if model.pre_logits is not None:
            assert torch.equal(model.pre_logits.weight, tiny_vivit(2, **changes).pre_logits.weight)


def test_video_heads_are_grouped():
    source = tiny_vivit(1, variant=M2, temporal_layers=3)
    model = init_from_video(tiny_vivit(2, variant=M2, temporal_layers=3, n_kv_heads=1), source)
    for part in ("encoder.blocks.0", "temporal.blocks.2"):
        name = f"{part}.attention.project.v.weight"
        wanted = source.state_dict()[name].unflatten(0, (4, 6)).mean(0)
        torch.testing.assert_close(model.state_dict()[name], wanted, rtol=0, atol=1e-7)
    with pytest.raises(UsageError, match=r"1 key-value heads there do not form the 2 groups"):
        init_from_video(tiny_vivit(3, variant=M2, temporal_layers=3, n_kv_heads=2), model)


def test_packed_source_and_packed_target():
    source, model = tiny_vivit(1, variant=M1), tiny_vivit(2, variant=M1)
    plain = init_from_video(tiny_vivit(2, variant=M1), source)
    assert equal_weights(init_from_video(model, source.for_inference()), plain)
    with pytest.raises(UsageError, match="packed for inference"):
        init_from_video(source, model)


# --- other sizes ---


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_resize_to_the_same_size_changes_nothing(kind):
    model = tiny_vivit(**kind)
    for again in (resize(model), resize(model, 11, (36, 22)), resize(model, num_frames=11)):
        assert equal_weights(model, again)
        assert torch.equal(model(clip()), again(clip()))
    assert not again.training
    assert again.head.weight.data_ptr() != model.head.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_resize_there_and_back(kind):
    """From 3 x 7 x 3 to 5 x 13 x 5 every second point stays in place, and going back takes just these."""
    model = tiny_vivit(**kind)
    larger = resize(model, num_frames=15, image_size=(66, 36))
    assert larger.config.grid == (5, 13, 5)
    assert larger(torch.zeros(2, 15, 66, 36, 3)).shape == (2, 13)
    back = resize(larger, num_frames=11, image_size=(36, 22))
    for (name, found), wanted in zip(back.state_dict().items(), model.state_dict().values(), strict=True):
        if name.endswith("positions"):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found, wanted)


def test_resized_positions_by_hand():
    model = tiny_vivit(variant=M3, pooling="gap")
    with torch.no_grad():
        model.encoder.positions.zero_()
        # Frame 0 is 0, frame 1 is 3, frame 2 is 9, everywhere.
        model.encoder.positions[1] = 3
        model.encoder.positions[2] = 9
    longer = resize(model, num_frames=12)
    assert longer.config.grid == (4, 7, 3)
    found = longer.encoder.positions.detach()[:, 5, 7]
    torch.testing.assert_close(found, torch.tensor([0.0, 2, 5, 9]))
    with torch.no_grad():
        model.encoder.positions.copy_(torch.arange(3.0).repeat(7)[:, None])
    wider = resize(model, image_size=(36, 28))
    found = wider.encoder.positions.detach()[1].reshape(7, 4, 24)[4, :, 11]
    torch.testing.assert_close(found, torch.tensor([0, 2 / 3, 4 / 3, 2]))


def test_resize_carries_what_belongs_to_the_model(tmp_path):
    model = tiny_vivit(variant=M1, image_size=(40, 28), tubelet_size=(3, 5, 5)).train()
    model.labels, model.files = [f"class {i}" for i in range(13)], {"LICENSE": b"free"}
    larger = resize(model, image_size=45)
    assert larger.training
    assert (larger.labels, larger.files) == (model.labels, model.files)
    modicum.save(larger, tmp_path / "larger")
    assert modicum.load(tmp_path / "larger", device="cpu").config.image_size == (45, 45)


def test_resize_of_a_packed_model():
    model = tiny_vivit(variant=M1)
    plain = resize(model, num_frames=15)
    packed = resize(model.for_inference(), num_frames=15)
    assert equal_weights(plain, packed)


@pytest.mark.parametrize("size", [{"image_size": 4}, {"num_frames": 2}, {"num_frames": 0}])
def test_resize_refuses_sizes_without_a_tubelet(size):
    with pytest.raises(UsageError, match="hold no tubelet|at least 1"):
        resize(tiny_vivit(variant=M1), **size)


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 28}, r"the image ViT has dim 24 and this ViViT dim 28: build this one to match"),
        ({"n_layers": 3, "ffn_dim": 30}, r"n_layers 2, ffn_dim 31 and this ViViT n_layers 3, ffn_dim 30:"),
        (
            {"n_heads": 6, "n_kv_heads": 6, "head_dim": 4},
            r"n_heads 4, head_dim 6 and this ViViT n_heads 6, head_dim 4:",
        ),
        ({"tubelet_size": (3, 7, 5)}, r"patch_size \(5, 7\) and this ViViT patch_size \(7, 5\):"),
        ({"activation": "relu"}, r"activation gelu and this ViViT activation relu:"),
        ({"qkv_bias": False}, r"qkv_bias True and this ViViT qkv_bias False:"),
        ({"head_dim": 5}, r"head_dim 6 and this ViViT head_dim 5:"),
    ],
)
def test_image_models_of_other_sizes_are_refused(image, changes, sentence):
    model = tiny_vivit(variant=M1, **changes)
    before = state(model)
    with pytest.raises(UsageError, match=sentence):
        init_from_image(model, image[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_projections_without_biases_start_a_model_without_them(tmp_path):
    biases = ("query.bias", "key.bias", "value.bias")
    tensors = {name: tensor for name, tensor in hugging_face(weights()).items() if not name.endswith(biases)}
    path = write_folder(tmp_path / "vit", tensors, hugging_face_config(qkv_bias=False))
    model = init_from_image(tiny_vivit(variant=M1, qkv_bias=False), path)
    wanted = weights()["encoder.blocks.1.attention.project.k.weight"]
    assert torch.equal(model.encoder.blocks[1].attention.project.k.weight, wanted)


def test_tensors_that_do_not_belong_together_are_refused(tmp_path):
    """A gated feed-forward whose halves are one tensor is named as a plain one."""
    tensors = hugging_face(weights())
    name = "encoder.layer.0.intermediate.dense"
    tensors |= {f"{name}.{leaf}": tensors[f"{name}.{leaf}"].repeat_interleave(2, 0) for leaf in ("weight", "bias")}
    model = tiny_vivit(variant=M1, ffn_dim=62)
    before = state(model)
    with pytest.raises(UsageError, match=r"ffn.down.weight` is \[24, 31\] there and \[24, 62\] in this ViViT"):
        init_from_image(model, write_folder(tmp_path / "vit", tensors, hugging_face_config()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_arguments_are_refused(image):
    model = tiny_vivit(variant=M1)
    with pytest.raises(UsageError, match="`kernel` is 'central': did you mean `central_frame`"):
        init_from_image(model, image[0], kernel="central")
    with pytest.raises(UsageError, match="`temporal` is 'zero': did you mean `zero_"):
        init_from_image(model, image[0], temporal="zero")
    with pytest.raises(CheckpointError, match="does not exist"):
        init_from_image(model, image[0] / "nowhere" / "else")
    with pytest.raises(UsageError, match="packed for inference"):
        init_from_image(model.for_inference(), image[0])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            {"variant": M4, "pooling": "gap"},
            "the other ViViT has variant factorized_dot_product and this ViViT variant",
        ),
        ({"variant": M1, "ffn_dim": 29}, "ffn_dim 29"),
        ({"variant": M1, "tubelet_size": (2, 5, 7)}, r"tubelet_size \(2, 5, 7\)"),
    ],
)
def test_video_models_of_other_kinds_are_refused(kind, sentence):
    with pytest.raises(UsageError, match=sentence):
        init_from_video(tiny_vivit(variant=M1), tiny_vivit(**kind))
