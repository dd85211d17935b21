"""The authors' checkpoints: their outputs are ours, in every layout, and what does not fit is refused.

`fixtures/` holds tiny random models of the authors' code (JAX 0.10, Flax 0.12, CPU, float32), a clip as uint8, and what
that code computed for it.
"""

import pickle
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from modicum.checkpoint.flax import flax_file, flax_parameters, read_flax
from modicum.checkpoint.scenic import read_scenic
from modicum.errors import CheckpointError, UsageError
from modicum.vivit import from_scenic
from modicum.vivit.load import assemble
from tests.vivit.scenic_files import (
    SCALAR,
    before_linen,
    chunked,
    equal_weights,
    extension,
    nested,
    scenic_parameters,
    write_flax,
)
from tests.vivit.tiny import KINDS, M1, M2, M3, M4, clip, name_of, tiny_vivit

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"num_frames": 8, "image_size": 32}
CASES = {
    "model1_token_prelogits": {},
    "model2_token_uniform": {"sampled_frames": 4},
    "model2_gap": {},
    "model2_spatial_only_token": {},
    "model3_gap_time_space": {"attention_order": "time_space"},
    "model4_gap": {"variant": M4},
}
TOLERANCE = 4e-6  # float32; what is seen is 1e-6, and the smallest mistake below makes 6e-6


def errors(model, case):
    """Largest differences of logits and features from what the authors' code computed."""
    io = np.load(FIXTURES / case / "io.npz")
    video = torch.from_numpy(io["video"])
    with torch.no_grad():
        logits, features = model(video), model(video, features=True).clip
    return [
        (a - torch.from_numpy(b)).abs().max().item() for a, b in ((logits, io["logits"]), (features, io["features"]))
    ]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_authors(case):
    model = from_scenic(FIXTURES / case, **SIZES, **CASES[case])
    assert not model.training
    assert max(errors(model, case)) <= TOLERANCE
    assert max(errors(model.for_inference(), case)) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        *((case, {"norm_eps": 1e-5}) for case in CASES),
        ("model1_token_prelogits", {"activation": "gelu"}),
        ("model1_token_prelogits", {"n_heads": 2, "n_kv_heads": 2, "head_dim": 24}),
        ("model2_gap", {"pooling": "gmp"}),
        ("model2_token_uniform", {"activation": "gelu"}),
        ("model2_spatial_only_token", {"activation": "gelu"}),
        ("model3_gap_time_space", {"attention_order": "space_time"}),
        ("model4_gap", {"variant": M1}),
    ],
)
def test_a_mistake_is_seen(case, mistake):
    config, state = read_scenic(FIXTURES / case, **SIZES, **CASES[case])
    wrong = assemble(replace(config, **mistake), state.items(), "cpu", torch.float32)
    assert errors(wrong, case)[0] > TOLERANCE


def test_half_the_heads_swapped_is_seen():
    model = from_scenic(FIXTURES / "model4_gap", **SIZES, variant=M4)
    for block in model.encoder.blocks:
        with torch.no_grad():
            for layer in block.attention.project.children():
                layer.weight.copy_(layer.weight.roll(24, 0))
                layer.bias.copy_(layer.bias.roll(24, 0))
            block.attention.out.weight.copy_(block.attention.out.weight.roll(24, 1))
    # The same heads in another order: nothing changes but which of them see time.
    assert errors(model, "model4_gap")[0] > TOLERANCE


def test_bfloat16_is_close():
    model = from_scenic(FIXTURES / "model2_gap", **SIZES, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert max(errors(model, "model2_gap")) < 0.05


def test_layouts():
    """Where the parameters lie in the file, and what lies beside them, changes nothing."""
    tree = read_flax(FIXTURES / "model1_token_prelogits/checkpoint.msgpack")
    state = {"global_step": np.int32(7), "rng": np.array([1, 2], np.uint32), "metadata/chrono": np.float64(3.5)}
    momentum = {f"{key}/momentum": value for key, value in tree.items()}
    layouts = [
        {f"optimizer/target/{key}": value for key, value in tree.items()}
        | {f"optimizer/state/param_states/{key}": value for key, value in momentum.items()},
        {f"optimizer/target/params/{before_linen(key)}": value for key, value in tree.items()},
        {f"params/{key}": value for key, value in tree.items()}
        | {f"opt_state/0/0/trace/{key}": value for key, value in tree.items()},
        {f"params/params/{key}": value for key, value in tree.items()},
        {f"opt_state/0/0/trace/{key}": value for key, value in tree.items()} | tree,
    ]
    for layout in layouts:
        found = flax_parameters(layout | state)
        assert found.keys() == tree.keys()
        assert all(found[key] is tree[key] for key in tree)


def test_numbers_of_blocks_are_left_alone():
    """Only names that Flax gave are counted anew; a missing block stays missing."""
    found = flax_parameters({"Transformer/encoderblock_2/MlpBlock_3/Dense_1/bias": np.zeros(1)})
    assert list(found) == ["Transformer/encoderblock_2/MlpBlock_0/Dense_0/bias"]


@pytest.mark.parametrize("kind", [*KINDS, {"variant": M2, "temporal_layers": 2, "uneven": True}], ids=name_of)
def test_other_sizes(tmp_path, kind):
    """Sizes come from the shapes: an oblong frame, a tubelet of three sides, a temporal encoder unlike the spatial."""
    settings = dict(kind)
    if settings.pop("uneven", False):
        settings |= {"temporal_heads": 3, "temporal_ffn_dim": 17, "pre_logits": 5, "tubelet_size": (1, 5, 7)}
        settings |= {"heads": (("noun", 9), ("verb", 4)), "sampled_frames": 3}
    model = tiny_vivit(**settings)
    file = write_flax(tmp_path / "model.msgpack", {"params": nested(scenic_parameters(model)), "global_step": 3})
    c = model.config
    read = from_scenic(
        file,
        num_frames=11,
        image_size=(36, 22),
        variant=c.variant,
        attention_order=c.attention_order,
        pooling=c.pooling,
        heads=dict(c.heads),
        sampled_frames=c.sampled_frames,
    )
    assert read.config == c
    assert equal_weights(read, model)
    assert torch.equal(read(clip(), features=True).clip, model(clip(), features=True).clip)


def test_variants_are_told_from_the_names(tmp_path):
    sizes = {"num_frames": 11, "image_size": (36, 22)}
    for kind in (
        {"variant": M1},
        {"variant": M2, "temporal_layers": 1},
        {"variant": M2},
        {"variant": M3, "pooling": "gap"},
    ):
        file = write_flax(tmp_path / "model", nested(scenic_parameters(tiny_vivit(**kind))))
        config, _ = read_scenic(file, **sizes)
        assert config == tiny_vivit(**kind).config
    file = write_flax(tmp_path / "model", nested(scenic_parameters(tiny_vivit(variant=M4, pooling="gap"))))
    with pytest.raises(UsageError, match=r"`variant` = spacetime or factorized_dot_product"):
        read_scenic(file, **sizes)
    assert read_scenic(file, **sizes, variant=M4)[0].variant == M4
    assert read_scenic(file, **sizes, variant=M1)[0].variant == M1


@pytest.mark.parametrize(
    ("case", "arguments", "sentence"),
    [
        ("model1_token_prelogits", {"num_frames": 6}, "64 tokens and 6 frames of 32x32 in tubelets of 2x8x8 make 48"),
        (
            "model1_token_prelogits",
            {"image_size": (32, 24)},
            "of 32x24 in .* make 48: give its num_frames, image_size and",
        ),
        (
            "model2_gap",
            {"num_frames": 16},
            "4 tokens in time and 16 frames make 8; it needs 8 frames: give num_frames=8",
        ),
        ("model2_gap", {"image_size": 40}, "16 tokens per frame and image_size 40x40 makes 25: .* such as 32x32"),
        ("model2_token_uniform", {}, "4 tokens in time and 8 frames make 8; .* sampled_frames=4"),
        ("model2_gap", {"pooling": "token"}, "`pooling` is token and the checkpoint has no class token: give gap"),
        ("model1_token_prelogits", {"pooling": "gmp"}, "`pooling` is gmp and the checkpoint has a class token"),
        ("model2_gap", {"variant": M1}, "`variant` is spacetime and the checkpoint holds a factorized_encoder"),
        ("model2_gap", {"heads": {"noun": 3, "verb": 3}}, "do not add up to 5"),
        ("model2_gap", {"pooling": "mean"}, "`pooling` is 'mean'"),
    ],
)
def test_arguments_that_the_file_contradicts(case, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_scenic(FIXTURES / case, **(SIZES | arguments))


def test_heads_split_the_projection():
    whole = from_scenic(FIXTURES / "model2_gap", **SIZES)
    split = from_scenic(FIXTURES / "model2_gap", **SIZES, heads={"noun": 3, "verb": 2})
    video = torch.from_numpy(np.load(FIXTURES / "model2_gap/io.npz")["video"])
    logits, by_head = whole(video), split(video)
    assert torch.equal(by_head["noun"], logits[:, :3])
    assert torch.equal(by_head["verb"], logits[:, 3:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.pop("output_projection/kernel"), "has no `output_projection/kernel`"),
        (lambda p: p.pop("Transformer/encoder_norm/bias"), r"lacks `encoder.norm.bias`:"),
        (lambda p: p.update({"Transformer/encoderblock_9/LayerNorm_0/bias": np.zeros(24)}), "requires nothing of that"),
        (lambda p: p.update({"Transformer/surprise/kernel": np.zeros((2, 2))}), "holds `Transformer/surprise/kernel`"),
        (lambda p: p.update({"Transformer/encoder_norm/bias": np.zeros(23)}), r"shape \[23\] .* requires \[24\]"),
        (lambda p: [p.pop(key) for key in list(p) if "encoderblock" in key], "has no encoder or no filters"),
        (lambda p: p.update({"embedding/kernel": np.zeros((5, 24))}), "has no encoder or no filters of a ViViT"),
    ],
)
def test_other_files_are_refused(tmp_path, change, sentence):
    parameters = scenic_parameters(tiny_vivit(variant=M1))
    change(parameters)
    file = write_flax(tmp_path / "checkpoint", nested(parameters))
    with pytest.raises(CheckpointError, match=sentence):
        from_scenic(file, num_frames=11, image_size=(36, 22))


def test_an_image_model_is_refused(tmp_path):
    """A ViT of the same code has the same names; its positions are those of one frame."""
    model = tiny_vivit(variant=M1, tubelet_size=(1, 5, 7), num_frames=1)
    file = write_flax(tmp_path / "checkpoint", nested(scenic_parameters(model)))
    with pytest.raises(UsageError, match="21 tokens and 32 frames"):
        from_scenic(file, image_size=(36, 22))


class TestFlax:
    def test_arrays(self, tmp_path):
        whole = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
        narrow = np.array([1.5, -2.0, 3e20], np.float32)
        tree = {
            "whole": whole,
            "pieces": chunked(whole, 7),
            "half": extension((narrow.view(np.uint32) >> 16).astype(np.uint16), dtype="bfloat16"),
            "scalar": extension(np.int32(-4), SCALAR),
            "int": 9,
            "nothing": {},
            "text": "left out",
            "deep": {"er": {"0": extension(np.zeros((0, 3), np.float16))}},
        }
        found = read_flax(write_flax(tmp_path / "file", tree))
        assert list(found) == ["whole", "pieces", "half", "scalar", "int", "deep/er/0"]
        assert np.array_equal(found["whole"], whole)
        assert np.array_equal(found["pieces"], whole)
        assert found["half"].dtype == np.float32
        assert np.allclose(found["half"], narrow, rtol=2**-8, atol=0)
        assert found["half"][0] == 1.5
        assert (found["scalar"], found["int"]) == (-4, 9)
        assert found["deep/er/0"].shape == (0, 3)

    def test_writing_into_an_array_leaves_the_file(self, tmp_path):
        file = write_flax(tmp_path / "file", {"x": np.ones(3)})
        before = file.read_bytes()
        read_flax(file)["x"][:] = 5
        assert file.read_bytes() == before

    def test_damaged_anywhere(self, tmp_path):
        """Whatever a byte is changed to, the file is read or refused in our words."""
        whole = write_flax(tmp_path / "file", {"a": {"b": np.ones((3, 2))}, "c": chunked(np.ones(5), 2)}).read_bytes()
        generator, refused = np.random.default_rng(0), 0
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] = generator.integers(256)
            (tmp_path / "file").write_bytes(damaged)
            try:
                read_flax(tmp_path / "file")
            except CheckpointError:
                refused += 1
        assert 50 < refused < len(whole)

    def test_truncated_anywhere(self, tmp_path):
        whole = write_flax(tmp_path / "file", {"a": {"b": np.ones((3, 2))}, "c": chunked(np.ones(5), 2)}).read_bytes()
        file = tmp_path / "cut"
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="is not a complete Flax checkpoint"):
                read_flax(file)
        file.write_bytes(whole)
        assert list(read_flax(file)) == ["a/b", "c"]

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (pickle.dumps({"a": 1}, protocol=4), "something follows its map"),
            (b"PK\x03\x04 a zip", "does not begin with a map"),
            (msgpack.packb([1, 2]), "does not begin with a map"),
            (msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}), "complex numbers"),
            (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "unknown extension 5"),
            (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((4,), "float32", b"1234")))}), "hold its elements"),
            (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((-1,), "float32", b"1234")))}), "hold its elements"),
            (
                msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))}),
                "it holds an array of object",
            ),
            (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "float99", b"12345678")))}), "float99"),
            (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((1, 2)))}), "no shape, dtype"),
        ],
    )
    def test_other_contents(self, tmp_path, content, sentence):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            read_flax(tmp_path / "file")

    def test_which_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            flax_file(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match="holds none"):
            flax_file(tmp_path)
        for step in (7, 30, 200):
            (tmp_path / f"checkpoint_{step}").touch()
        (tmp_path / "checkpoint_300.tmp").touch()
        (tmp_path / "checkpoint_400").mkdir()
        assert flax_file(tmp_path).name == "checkpoint_200"
        (tmp_path / "model.msgpack").touch()
        with pytest.raises(CheckpointError, match=r"several: checkpoint_200, model.msgpack: give the file itself"):
            flax_file(tmp_path)
        assert flax_file(tmp_path / "checkpoint_7").name == "checkpoint_7"
