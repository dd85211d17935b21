"""ViViT folders: the stock layout of `transformers` both ways, and ours for what it cannot hold."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import modicum
from modicum import api
from modicum.checkpoint.vivit_hf import stock_vivit_config, vivit_config
from modicum.errors import CheckpointError, UsageError
from tests.vivit.scenic_files import equal_weights
from tests.vivit.tiny import KINDS, M1, M2, clip, name_of, settings, tiny_vivit

TOLERANCE = 3e-6  # twice the largest difference that was seen between the two, in float32
LABELS = [f"sport {i}" for i in range(13)]
TINY = {
    "image_size": [36, 22],
    "num_frames": 11,
    "tubelet_size": [3, 5, 7],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 31,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: i for i, label in enumerate(LABELS)},
}


def stock_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = transformers.VivitForVideoClassification(transformers.VivitConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "layernorm" in name and "weight" in name else 0, 0.2)
    return model


def stock_logits(model, video):
    with torch.no_grad():
        return model(video.movedim(-1, 2)).logits


def loaded(path):
    return transformers.VivitForVideoClassification.from_pretrained(path).eval()


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu", "layer_norm_eps": 1e-3},
        {"qkv_bias": False},
        {"image_size": 35, "num_frames": 6},
    ],
    ids=str,
)
def test_parity_with_transformers(tmp_path, changes):
    stock = stock_model(**changes)
    stock.save_pretrained(tmp_path / "stock")
    model = modicum.load(tmp_path / "stock")
    assert model.config.variant == M1
    assert model.config.image_size == ((35, 35) if "image_size" in changes else (36, 22))
    video = torch.rand(3, model.config.num_frames, *model.config.image_size, 3) * 2 - 1
    expected = stock_logits(stock, video)
    assert expected.abs().max() > 1
    with torch.no_grad():
        assert difference(model(video), expected) < TOLERANCE
        assert difference(model(pixel_values=video.movedim(-1, 2)), expected) < TOLERANCE
    modicum.save(model, tmp_path / "ours")
    again = loaded(tmp_path / "ours")
    assert difference(stock_logits(again, video), expected) == 0
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written == json.loads((tmp_path / "stock/config.json").read_text())
    assert (
        load_file(tmp_path / "ours/model.safetensors").keys() == load_file(tmp_path / "stock/model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("layer_norm_eps", 1e-4), ("num_attention_heads", 8), ("tubelet_size", [3, 7, 5])],
)
def test_a_key_that_is_not_honoured_is_seen(tmp_path, key, value):
    """The comparison above fails when one of these is read wrongly."""
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    if key == "tubelet_size":
        with pytest.raises(CheckpointError, match="must belong together"):
            modicum.load(tmp_path)
    else:
        assert difference(modicum.load(tmp_path)(clip()), stock_logits(stock, clip())) > TOLERANCE


def test_a_fresh_model_in_transformers(tmp_path):
    """A model that never had a config.json: what we write, `transformers` reads."""
    depth = {"stochastic_depth": 0.1, "stochastic_depth_rule": "equation_10"}
    model = tiny_vivit(variant=M1, activation="silu", head_dim=7, **depth)
    model.labels = LABELS
    modicum.save(model, tmp_path / "new")
    again = loaded(tmp_path / "new")
    assert again.config.id2label == dict(enumerate(LABELS))
    assert again.config.label2id["sport 3"] == 3
    with torch.no_grad():
        assert difference(stock_logits(again, clip()), model(clip())) < TOLERANCE
    ours = modicum.load(tmp_path / "new")
    assert ours.labels == LABELS
    assert ours.config == model.config
    assert equal_weights(ours, model)


def test_newer_names(tmp_path):
    """transformers 5 can write the names that its modules have in memory."""
    stock = stock_model()
    stock.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.startswith("vivit.layers.0.attention.q_proj") for name in load_file(tmp_path / "model.safetensors"))
    assert difference(modicum.load(tmp_path)(clip()), stock_logits(stock, clip())) < TOLERANCE


def test_dtypes(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path / "float32")
    half = modicum.load(tmp_path / "float32", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    modicum.save(half, tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "bfloat16/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bfloat16/config.json").read_text())["dtype"] == "bfloat16"
    again = modicum.load(tmp_path / "bfloat16")
    assert again.dtype == torch.bfloat16
    assert equal_weights(again, half)
    full = modicum.load(tmp_path / "bfloat16", dtype=torch.float32)
    noise = difference(full(clip()), stock_logits(stock, clip()))
    assert TOLERANCE < noise < 0.1
    assert equal_weights(modicum.load(tmp_path / "float32").to(torch.bfloat16), half)


def test_a_packed_model_is_saved_as_it_was(tmp_path):
    model = tiny_vivit(variant=M1)
    modicum.save(model, tmp_path / "plain")
    modicum.save(model.for_inference(), tmp_path / "packed")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_travel(tmp_path):
    stock_model().save_pretrained(tmp_path / "stock")
    (tmp_path / "stock/preprocessor_config.json").write_text('{"do_resize": true}')
    modicum.save(modicum.load(tmp_path / "stock"), tmp_path / "ours")
    assert (tmp_path / "ours/preprocessor_config.json").read_text() == '{"do_resize": true}'


def test_another_number_of_classes(tmp_path):
    """Keys that the model contradicts are written anew, the others kept."""
    base = json.loads(json.dumps({**TINY, "model_type": "vivit", "note": "kept", "torch_dtype": "float32"}))
    cfg = replace(vivit_config(base), num_classes=2, image_size=(35, 35))
    written = stock_vivit_config(cfg, base)
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert written["image_size"] == 35
    assert written["note"] == "kept"
    assert "dtype" not in written
    assert vivit_config(written) == cfg


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_channels": 1}, "`num_channels` = 1, where modicum needs 3"),
        ({"hidden_act": "quick_gelu"}, '`hidden_act` = "quick_gelu"'),
        ({"num_attention_heads": 5}, "divides the width of 24"),
        ({"tubelet_size": [2, 16]}, "3 whole numbers"),
        ({"image_size": [36, 0]}, "2 whole numbers"),
        ({"image_size": 3}, "hold no tubelet"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`"),
        ({"pruned_heads": {"0": [1]}}, "`pruned_heads`"),
        ({"id2label": {"0": "a", "2": "b"}}, 'a name for each of "0" to "1"'),
        ({"num_hidden_layers": 3}, r"lacks `vivit.encoder.layer.2.layernorm_before.weight` and 15 more"),
        ({"num_hidden_layers": 1}, r"surplus `vivit.encoder.layer.1"),
        ({"num_frames": 14}, r"position_embeddings` has shape \[1, 64, 24\] .* requires \[1, 85, 24\]"),
        ({"model_type": "modicum-vivit"}, r"VivitConfig has no key `\w+`"),
    ],
    ids=str,
)
def test_config_refusals(tmp_path, changes, sentence):
    stock_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    if "id2label" in changes:
        tensors = load_file(tmp_path / "model.safetensors")
        for name in ("weight", "bias"):
            tensors[f"classifier.{name}"] = tensors[f"classifier.{name}"][:2].clone()
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        modicum.load(tmp_path)


def test_a_model_without_a_head_is_refused(tmp_path):
    stock_model().vivit.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a bare VivitModel has none: give a VivitForVideoClassification"):
        modicum.load(tmp_path)


class TestOwnFolder:
    @pytest.mark.parametrize("kind", KINDS, ids=name_of)
    def test_round_trip(self, tmp_path, kind):
        model = tiny_vivit(**kind, stochastic_depth=0.1)
        modicum.save(model, tmp_path / "folder")
        again = modicum.load(tmp_path / "folder")
        assert again.config == model.config
        assert not again.training
        assert again.labels is None
        assert torch.equal(again(clip()), model(clip()))
        stock = json.loads((tmp_path / "folder/config.json").read_text())["model_type"] == "vivit"
        assert stock == (kind == {"variant": M1})

    @pytest.mark.parametrize(
        "changes",
        [
            {"n_kv_heads": 2},
            {"pre_logits": 5},
            {"sampled_frames": 9},
            {"heads": (("noun", 9), ("verb", 4))},
            {"variant": M2, "temporal_layers": 1, "temporal_heads": 2, "temporal_ffn_dim": 17},
        ],
        ids=str,
    )
    def test_what_the_stock_layout_cannot_hold(self, tmp_path, changes):
        model = tiny_vivit(**({"variant": M1} | changes))
        model.labels = LABELS
        modicum.save(model, tmp_path / "folder")
        written = json.loads((tmp_path / "folder/config.json").read_text())
        assert written["model_type"] == "modicum-vivit"
        again = modicum.load(tmp_path / "folder")
        assert again.config == model.config
        assert again.labels == LABELS
        assert equal_weights(again, model)

    def test_labels_leave_the_stock_layout_with_the_model(self, tmp_path):
        stock_model().save_pretrained(tmp_path / "stock")
        model = modicum.load(tmp_path / "stock")
        pooled = tiny_vivit(**settings(variant=M1, pooling="gap"))
        pooled.labels, pooled.stock_config = model.labels, model.stock_config
        modicum.save(pooled, tmp_path / "folder")
        assert modicum.load(tmp_path / "folder").labels == LABELS

    def test_wrong_numbers_of_labels(self, tmp_path):
        model = tiny_vivit(variant=M2)
        model.labels = LABELS[:-1]
        with pytest.raises(UsageError, match="12 labels were given for 13 classes: give one per class"):
            modicum.save(model, tmp_path / "folder")

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"temporal_layer": 3}, "no key `temporal_layer`: did you mean `temporal_layers`?"),
            ({"pooling": "mean"}, "`pooling` is 'mean'"),
            ({"temporal_layers": 1}, r"lacks `temporal.class_token` and 19 more"),
            ({"pooling": "gap"}, r"`encoder.class_token` has shape \[24\] .* requires nothing of that name"),
            ({"dim": 25}, r"requires \[25\]"),
        ],
    )
    def test_refusals(self, tmp_path, changes, sentence):
        modicum.save(tiny_vivit(variant=M2), tmp_path / "folder")
        path = tmp_path / "folder/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=sentence):
            modicum.load(tmp_path / "folder")


def test_a_video_model_writes_no_text():
    with pytest.raises(UsageError, match="video classifier and writes no text"):
        api.generate(tiny_vivit(variant=M1), [[1, 2]])


def test_a_model_is_trained_apart_from_its_file(tmp_path):
    """Weights are copies: training one model changes neither the file nor the next."""
    modicum.save(tiny_vivit(variant=M2), tmp_path / "folder")
    first = modicum.load(tmp_path / "folder").train()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert equal_weights(modicum.load(tmp_path / "folder"), tiny_vivit(variant=M2))
