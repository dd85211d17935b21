"""The four models: sizes, what goes in, what comes out, and what is refused."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import modicum.vivit
from modicum.config import VivitConfig
from modicum.errors import UsageError
from modicum.vivit.build import initialise, named_config
from modicum.vivit.model import Vivit
from modicum.vivit.tubelets import TubeletEmbedding, sampled_indices
from tests.vivit.tiny import KINDS, M1, M2, M3, M4, MODELS, VARIANTS, S, T, clip, name_of, settings, tiny_vivit


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("vivit-b/16x2", {"variant": M1}, 88_954_000),
        ("vivit-b/16x2", {"variant": M2}, 115_062_928),
        ("vivit-b/16x2", {"variant": M2, "temporal_layers": 0}, 86_696_080),
        ("vivit-b/16x2", {"variant": M3}, 117_319_312),
        ("vivit-b/16x2", {"variant": M4}, 88_952_464),
        ("ViViT-L/16x2", {"temporal_layers": 24}, 606_827_920),
    ],
)
def test_parameters(name, changes, parameters):
    with torch.device("meta"):
        model = Vivit(named_config(name, **changes))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_parameter_learns(kind):
    model = tiny_vivit(**kind).train()
    model(clip()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias adds the same to all scores of a query, which the softmax takes out again.
        if not name.endswith("project.k.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_features(kind):
    model = tiny_vivit(**kind)
    with torch.no_grad():
        logits, features = model(clip()), model(clip(), features=True)
        assert logits.shape == (2, 13)
        assert features.clip.shape == (2, 24)
        assert features.frames.shape == (2, T, 24)
        assert features.patches.shape == (2, T, S, 24)
        torch.testing.assert_close(model.head(features.clip), logits)
        if kind["variant"] == M2:
            torch.testing.assert_close(model.classify_frames(features.frames), logits)
        else:
            torch.testing.assert_close(features.frames, features.patches.mean(2))
        pool = {"gap": torch.mean, "gmp": torch.amax, "gsp": torch.sum}.get(kind.get("pooling", "token"))
        if pool is not None and kind["variant"] == M2:
            torch.testing.assert_close(features.frames, pool(features.patches, dim=2))
        elif pool is not None:
            torch.testing.assert_close(features.clip, pool(features.patches.flatten(1, 2), dim=1))
    tied = [name for name, _ in model.named_parameters() if name.endswith("class_token")]
    assert len(tied) == (pool is None) * (2 if model.temporal is not None else 1)


@pytest.mark.parametrize("variant", [M1, M2])
def test_the_class_token_stands_first_with_a_position_of_its_own(variant):
    model = tiny_vivit(variant=variant)
    encoder = model.encoder
    encoder.blocks = torch.nn.ModuleList()
    with torch.no_grad():
        features = model(clip(), features=True)
        token_D = encoder.norm(encoder.class_token + encoder.positions[0])
        torch.testing.assert_close(features.clip, token_D.expand(2, -1))
        # A factorized encoder has one table for all frames.
        positions = encoder.positions[1:].unflatten(0, (T, S)) if variant == M1 else encoder.positions[1:]
        torch.testing.assert_close(features.patches, encoder.norm(model.embed(clip()) + positions))


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_a_layer_before_the_head(kind):
    model = tiny_vivit(pre_logits=17, **kind)
    with torch.no_grad():
        features = model(clip(), features=True)
        assert features.clip.shape == (2, 17)
        assert features.clip.abs().max() < 1  # tanh
        torch.testing.assert_close(model.head(features.clip), model(clip()))


def test_two_heads_are_parts_of_one_projection_in_order():
    heads = (("noun", 8), ("verb", 5))
    model, plain = tiny_vivit(variant=M1, heads=heads), tiny_vivit(variant=M1)
    with torch.no_grad():
        out, logits = model(clip()), plain(clip())
    assert list(out) == ["noun", "verb"]
    torch.testing.assert_close(out["noun"], logits[:, :8])
    torch.testing.assert_close(out["verb"], logits[:, 8:])


def test_frames_of_a_factorized_encoder_stand_alone():
    model, video = tiny_vivit(variant=M2, temporal_layers=3), clip()
    with torch.no_grad():
        frames_BTD = model.encode_frames(video)
        torch.testing.assert_close(model.classify_frames(frames_BTD), model(video))
        for t in range(T):
            torch.testing.assert_close(model.encode_frames(video[:, 3 * t : 3 * t + 3])[:, 0], frames_BTD[:, t])
        # Order in time matters, so the temporal encoder is not an average.
        assert not torch.allclose(model.classify_frames(frames_BTD.flip(1)), model(video), atol=1e-2)
        average = tiny_vivit(variant=M2)
        frames_BTD = average.encode_frames(video)
        torch.testing.assert_close(average.classify_frames(frames_BTD.flip(1)), average(video))


@pytest.mark.parametrize("pooling", ["token", "gap"])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_frame_vectors_of_another_length_are_refused(pooling, frames):
    model = tiny_vivit(variant=M2, temporal_layers=3, pooling=pooling)
    with pytest.raises(UsageError, match=rf"\[2, {frames}, 24\].*reads \[B, 3, 24\]"):
        model.classify_frames(torch.zeros(2, frames, 24))


def test_an_average_over_frames_takes_any_length():
    model = tiny_vivit(variant=M2)
    with torch.no_grad():
        one = model.classify_frames(torch.ones(2, 1, 24))
        torch.testing.assert_close(model.classify_frames(torch.ones(2, 7, 24)), one)


@pytest.mark.parametrize("kind", [k for k in MODELS if k["variant"] != M2], ids=name_of)
def test_only_a_factorized_encoder_encodes_frames(kind):
    model = tiny_vivit(**kind)
    with pytest.raises(UsageError, match="use a factorized_encoder"):
        model.encode_frames(clip())
    with pytest.raises(UsageError, match="use a factorized_encoder"):
        model.classify_frames(torch.zeros(2, T, 24))


def test_tubelets_are_a_convolution_whose_stride_is_its_kernel():
    torch.manual_seed(0)
    size, video = (3, 5, 7), torch.randn(2, 11, 36, 22, 3)
    embed = TubeletEmbedding(size, 3, 13)
    kernel = embed.project.weight.unflatten(1, (*size, 3)).movedim(-1, 1)
    expected = F.conv3d(video.movedim(-1, 1), kernel, embed.project.bias, stride=size)
    assert expected.shape == (2, 13, 3, 7, 3)
    ours = embed(video)
    torch.testing.assert_close(ours, expected.flatten(3).permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    # Remainders are dropped: what stands in them changes nothing.
    video[:, 9:], video[:, :, 35:], video[:, :, :, 21:] = 5, 6, 7
    assert torch.equal(embed(video), ours)


def test_bytes_are_scaled_to_minus_one_and_one():
    model = tiny_vivit(variant=M1)
    video = torch.randint(0, 256, (2, 11, 36, 22, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(video), model(video.float() / 127.5 - 1))
        for byte, value in ((0, -1.0), (255, 1.0)):
            torch.testing.assert_close(
                model(torch.full_like(video, byte)), model(torch.full(video.shape, value)), rtol=0, atol=0
            )


def test_channels_may_come_second():
    model, video = tiny_vivit(variant=M2), clip()
    with torch.no_grad():
        assert torch.equal(model(pixel_values=video.movedim(-1, 2)), model(video))


@pytest.mark.parametrize(
    ("frames", "kept", "expected"),
    [
        (32, 8, [4, 7, 11, 14, 18, 21, 25, 28]),
        (5, 1, [2]),  # 2.5 to even
        (7, 1, [4]),  # 3.5 to even
        (3, 2, [1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (4, 9, [0, 1, 2, 3]),
    ],
)
def test_uniform_frame_sampling_by_hand(frames, kept, expected):
    assert sampled_indices(frames, kept) == expected


def test_uniform_frame_sampling_keeps_what_it_is_asked_for():
    for frames in range(1, 70):
        for kept in range(1, frames + 5):
            indices = sampled_indices(frames, kept)
            assert len(indices) == min(kept, frames)
            assert indices == sorted(set(indices))
            assert 0 <= indices[0] <= indices[-1] < frames
            gaps = [b - a for a, b in itertools.pairwise(indices)]
            assert not gaps or max(gaps) - min(gaps) <= 2


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_a_model_samples_its_frames(kind):
    sampling, short = tiny_vivit(sampled_frames=6, **kind), tiny_vivit(num_frames=6, **kind)
    assert sampling.config.grid == short.config.grid == (2, 7, 3)
    with torch.no_grad():
        torch.testing.assert_close(sampling(clip()), short(clip()[:, [2, 3, 5, 6, 8, 9]]))


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_one_graph_without_breaks(kind):
    model = tiny_vivit(**kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(clip()), model(clip()))
        torch.testing.assert_close(compiled(clip(), features=True).frames, model(clip(), features=True).frames)
        explained = torch._dynamo.explain(model)(clip())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_bfloat16(kind):
    model = tiny_vivit(**kind)
    with torch.no_grad():
        expected = model(clip())
        model.bfloat16()
        assert model.dtype == torch.bfloat16
        logits = model(clip())
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() < 0.03 * expected.norm()
        assert not torch.equal(logits.float(), expected)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_packed_for_inference(kind):
    model = tiny_vivit(**kind).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(clip())
        assert model.for_inference() is model
        assert not model.training
        torch.testing.assert_close(model(clip()), expected)
    dense = model.dense_state()
    assert dense.keys() == state.keys()
    assert all(torch.equal(dense[name], state[name]) for name in state)
    with pytest.raises(UsageError, match="packed for inference and cannot be trained"):
        model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("variant", [M1, M2])
def test_packed_with_long_rows(variant):
    """Enough tokens for attention to go another way than PyTorch's kernel, with grouped queries."""
    model = tiny_vivit(variant=variant, tubelet_size=(3, 1, 1), n_kv_heads=2, head_dim=16)
    assert model.config.grid == (3, 36, 22)
    with torch.no_grad():
        expected = model(clip())
        torch.testing.assert_close(model.for_inference()(clip()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(2, 10, 36, 22, 3),
        torch.zeros(2, 11, 22, 36, 3),
        torch.zeros(2, 11, 36, 22, 4),
        torch.zeros(2, 3, 11, 36, 22),
        torch.zeros(11, 36, 22, 3),
    ],
)
def test_a_video_of_another_shape_is_refused(video):
    with pytest.raises(UsageError, match=r"this model reads \[B, 11, 36, 22, 3\]") as refusal:
        tiny_vivit(variant=M1)(video)
    assert str(list(video.shape)) in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integers_other_than_bytes_are_refused(dtype):
    """They would pass for values in [-1, 1]."""
    for read in (tiny_vivit(variant=M1), tiny_vivit(variant=M2).encode_frames):
        with pytest.raises(UsageError, match=f"{dtype}.*uint8"):
            read(torch.zeros(2, 11, 36, 22, 3, dtype=dtype))


def test_no_video_is_refused():
    with pytest.raises(UsageError, match="no video was given"):
        tiny_vivit(variant=M1)()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "factorised_encoder"}, "did you mean `factorized_encoder`"),
        ({"variant": M1, "temporal_layers": 2}, "only a factorized_encoder has a temporal encoder"),
        ({"variant": M2, "temporal_layers": -1}, "`temporal_layers` is -1"),
        ({"variant": M3}, "factorized_self_attention has no class token: choose pooling gap"),
        ({"variant": M4}, "factorized_dot_product has no class token: choose pooling gap"),
        ({"variant": M1, "pooling": "max"}, "`pooling` is 'max'"),
        ({"variant": M3, "pooling": "gap", "attention_order": "timespace"}, "did you mean `time_space`"),
        ({"variant": M4, "pooling": "gap", "n_heads": 3, "n_kv_heads": 3}, "cannot halve 3 query"),
        ({"variant": M4, "pooling": "gap", "n_kv_heads": 1}, "cannot halve 4 query and 1 key-value heads"),
        ({"variant": M1, "n_kv_heads": 3}, "3 key-value heads do not divide 4 query heads: choose one of 1, 2, 4"),
        ({"variant": M1, "heads": (("noun", 8), ("verb", 6))}, "do not add up to 13 classes"),
        ({"variant": M1, "stochastic_depth": 1.0}, "`stochastic_depth` is 1.0"),
        ({"variant": M1, "stochastic_depth": math.nan}, "`stochastic_depth` is nan"),
        ({"variant": M1, "num_frames": 2}, "2 frames of 36x22 hold no tubelet of 3x5x7"),
        ({"variant": M1, "sampled_frames": 2}, "2 frames of 36x22 hold no tubelet"),
        ({"variant": M1, "image_size": (36, 6)}, "36x6 hold no tubelet"),
        ({"variant": M1, "n_layers": 0}, "`n_layers` is 0: it must be at least 1"),
        ({"variant": M1, "dtype": "int8"}, "`dtype` is 'int8'"),
        ({"variant": M1, "activation": "gelu_tan"}, "did you mean `gelu_tanh`"),
    ],
)
def test_configurations_that_cannot_be_built(changes, said):
    with pytest.raises(UsageError, match=said):
        VivitConfig(**settings(**changes))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_configuration_survives_json(kind):
    config = VivitConfig(**settings(heads=(("noun", 8), ("verb", 5)), temporal_heads=None, **kind))
    assert VivitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_build(variant):
    torch.manual_seed(0)
    model = modicum.vivit.build(
        "vivit-s/16x2", variant=variant, num_frames=4, image_size=(32, 48), heads={"noun": 7, "verb": 4}
    )
    assert not model.training
    assert model.config.grid == (2, 2, 3)
    assert model.config.temporal_layers == (4 if variant == M2 else 0)
    with torch.no_grad():
        out = model(torch.rand(1, 4, 32, 48, 3))
    assert {name: logits.tolist() for name, logits in out.items()} == {"noun": [[0.0] * 7], "verb": [[0.0] * 4]}


def test_how_fresh_weights_begin():
    config = VivitConfig(
        **settings(variant=M2, temporal_layers=2, dim=48, ffn_dim=190, qkv_bias=False, image_size=(95, 91))
    )
    model, again, other = Vivit(config), Vivit(config), Vivit(config)
    for each, seed in ((model, 3), (again, 3), (other, 4)):
        initialise(each, seed)
    state = model.state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(state["encoder.positions"], other.state_dict()["encoder.positions"])
    for name, tensor in state.items():
        if name.endswith(("bias", "class_token")) or name.startswith("head"):
            assert not tensor.any(), name
        elif name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
    assert state["encoder.positions"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["embed.project.weight"].std().item() == pytest.approx(1 / math.sqrt(3 * 5 * 7 * 3), rel=0.05)
    up = state["encoder.blocks.0.ffn.project.up.weight"]
    assert up.abs().max().item() == pytest.approx(math.sqrt(6 / (48 + 190)), rel=0.01)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vivit-x/16x2", {}, "`vivit-x/16x2` is not a ViViT's name.*sizes are s, b, l, h"),
        ("vivit-b/16", {}, "give a size, the patch's side and the tubelet's frames as in vivit-b/16x2"),
        ("vit-b/16x2", {}, "is not a ViViT's name"),
        ("vivit-s/16x2", {"varient": M1}, "did you mean `variant`"),
        ("vivit-s/16x2", {"variant": "model1"}, "`variant` is 'model1'"),
        ("vivit-s/16x2", {"variant": M1, "temporal_layers": 4}, "only a factorized_encoder"),
        ("vivit-s/16x2", {"variant": M4, "pooling": "token"}, "has no class token"),
        ("vivit-s/16x2", {"n_kv_heads": 4}, "4 key-value heads do not divide 6 query heads"),
        ("vivit-s/16x2", {"n_kv_heads": 0}, "`n_kv_heads` is 0"),
        ("vivit-s/16x2", {"image_size": 15}, "hold no tubelet"),
        ("vivit-s/16x0", {}, "is not a ViViT's name"),
        ("vivit-s/0x2", {}, "is not a ViViT's name"),
    ],
)
def test_what_cannot_be_built_by_name(name, changes, said):
    with pytest.raises(UsageError, match=said):
        modicum.vivit.build(name, **changes)
