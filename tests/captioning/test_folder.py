"""A captioner's folder: written and read whole, with or without its encoder, and what `inspect` says of it."""

import json

import pytest
import torch
from typer.testing import CliRunner

import modicum
from modicum.captioning.assemble import from_parts
from modicum.checkpoint.io import Checkpoint
from modicum.cli.main import app
from modicum.errors import CheckpointError, UsageError
from tests.helpers import clips, tiny_captioner
from tests.speculative.readers import CAPTIONERS, LAYERED, name_of
from tests.vivit.tiny import MODELS, tiny_vivit

GREEDY = {"max_new_tokens": 9}
TARGET = "modicum-code-target"


@pytest.mark.parametrize("kind", CAPTIONERS, ids=name_of)
def test_saved_and_loaded(kind, tmp_path):
    model, given = kind.make(), kind.sources([4, 2])
    model.eos_ids = frozenset({7})
    model.stock_config = {"eos_token_id": 7, "vocab_size": 99}
    modicum.save(model, tmp_path / "plain")
    expected = modicum.caption(model, given, **GREEDY).tokens
    modicum.save(model, tmp_path / "packed")  # as if it had never been
    for name in ("plain", "packed"):
        loaded = modicum.load(tmp_path / name)
        assert loaded.config == model.config
        assert loaded.eos_ids == {7}
        assert loaded.stock_config["eos_token_id"] == 7
        assert modicum.caption(loaded, given, **GREEDY).tokens == expected
    half = modicum.load(tmp_path / "plain", dtype="bfloat16")
    modicum.save(half, tmp_path / "half")
    stored = modicum.read_checkpoint(tmp_path / "half")
    assert {tensor.dtype for tensor in stored.state_dict.values()} == {torch.bfloat16}
    assert stored.config["encoder"]["dtype"] == stored.config["decoder"]["dtype"] == "bfloat16"
    assert "vocab_size" not in stored.config


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny_captioner(tie_embeddings=True, rope=None, **LAYERED)
    modicum.save(model, tmp_path / "tied")
    assert "decoder.head.weight" not in modicum.read_checkpoint(tmp_path / "tied").state_dict
    loaded = modicum.load(tmp_path / "tied")
    assert loaded.head.weight is loaded.embed.weight
    given = clips([9, 6])
    assert modicum.caption(loaded, given, **GREEDY).tokens == modicum.caption(model, given, **GREEDY).tokens


def test_a_draft_without_its_encoder(tmp_path):
    target, given = tiny_captioner(), clips([9, 4, 9])
    modicum.save(target, tmp_path / "target")
    modicum.save(tiny_captioner(5, n_layers=1).without_encoder(), tmp_path / "draft")
    loaded, draft = modicum.load(tmp_path / "target"), modicum.load(tmp_path / "draft")
    assert not any(name.startswith("encoder") for name in modicum.read_checkpoint(tmp_path / "draft").state_dict)
    expected = modicum.caption(loaded, given, **GREEDY).tokens
    assert modicum.caption(loaded, given, draft=draft, **GREEDY).tokens == expected
    with pytest.raises(UsageError, match="saved without its encoder"):
        modicum.caption(draft, given)
    # Given one, it captions by itself, and is saved as small as before.
    assert len(modicum.caption(draft.share(loaded), given, **GREEDY).tokens) == 3
    modicum.save(draft, tmp_path / "again")
    assert sorted(modicum.read_checkpoint(tmp_path / "again").state_dict) == sorted(
        modicum.read_checkpoint(tmp_path / "draft").state_dict
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_draft_knows_its_encoder_in_any_dtype(dtype, tmp_path):
    """float32 rounded to float16 and then to bfloat16 is not what it is rounded to bfloat16 alone."""
    target = tiny_captioner()
    modicum.save(target, tmp_path / "target")
    modicum.save(tiny_captioner(5, n_layers=1).without_encoder(), tmp_path / "draft")
    modicum.save(tiny_captioner(encoder={"dim": 48}, seed=1).without_encoder(), tmp_path / "stranger")
    loaded, draft = (modicum.load(tmp_path / name, dtype=dtype) for name in ("target", "draft"))
    assert loaded.encoder_fingerprint == target.encoder_fingerprint
    assert len(modicum.caption(loaded, clips([9]), draft=draft, max_new_tokens=3).tokens[0]) == 3
    with pytest.raises(UsageError, match="trained on another encoder's output"):
        modicum.caption(loaded, clips([9]), draft=modicum.load(tmp_path / "stranger", dtype=dtype))


def test_made_of_what_ships(tmp_path):
    text = modicum.load(TARGET, dtype="float32")
    model = from_parts(tiny_vivit(**MODELS[1]), text)
    assert model.config.decoder_start_id in text.eos_ids
    modicum.save(model, tmp_path / "captioner")
    loaded = modicum.load(tmp_path / "captioner")
    assert loaded.tokenizer.difference(text.tokenizer) is None
    assert loaded.eos_ids == text.eos_ids
    assert "training.json" not in loaded.files
    (video,) = clips([11], size=(36, 22))
    out = modicum.caption(loaded, video, prompt="def main(", draft=text, max_new_tokens=12)
    # It has not learned to look yet: the language model's own words.
    start = [loaded.config.decoder_start_id, *text.tokenizer.encode("def main(")]
    assert out.tokens == modicum.generate(text, [start], temperature=0, max_new_tokens=12).tokens
    assert out.texts == [text.tokenizer.decode(out.tokens[0])]
    assert out.stats.acceptance_rate == 1


def broken(tmp_path, **changes):
    modicum.save(tiny_captioner(), tmp_path / "model")
    ckpt = modicum.read_checkpoint(tmp_path / "model")
    tensors = changes.pop("tensors", lambda state: state)
    modicum.write_checkpoint(
        Checkpoint({**ckpt.config, **changes}, tensors(dict(ckpt.state_dict))), tmp_path / "broken"
    )
    return modicum.load(tmp_path / "broken")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memoryy": "frames"}, "config.json: CaptionerConfig has no key `memoryy`: did you mean `memory`"),
        ({"memory": "frame"}, "`memory` is 'frame': did you mean `frames`"),
        ({"decoder_start_id": 29}, "`decoder_start_id` is 29"),
        ({"tensors": lambda s: {k: v for k, v in s.items() if k != "project.norm.bias"}}, "lacks `project.norm.bias`"),
        (
            {"tensors": lambda s: {**s, "more": torch.zeros(1)}},
            "`more` has shape \\[1\\] .* requires nothing of that name",
        ),
        ({"tensors": lambda s: {**s, "project.norm.bias": torch.zeros(5)}}, "requires \\[24\\]"),
    ],
)
def test_damaged_folders(changes, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        broken(tmp_path, **changes)


def test_inspect(tmp_path):
    model = tiny_captioner(memory="patches")
    modicum.save(model, tmp_path / "model")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model"), "--json"])
    facts = json.loads(result.stdout)
    counted = {name: p.numel() for name, p in model.named_parameters()}
    assert facts["parameters"] == sum(counted.values())
    by_part = facts["parameters_by_part"]
    assert by_part["encoder"] == sum(n for name, n in counted.items() if name.startswith("encoder."))
    assert by_part["projection"] == 14 * 24 + 24 + 2 * 24
    # Per layer: queries and outputs 24 x 60, keys and values 24 x 20, and a norm.
    assert by_part["cross_attention"] == 2 * (2 * 24 * 60 + 2 * 24 * 20 + 24)
    assert sum(by_part.values()) == facts["parameters"]
    assert facts["memory_slots"] == 24
    assert [row["kv_heads"] for row in facts["groups"]] == [2, 1]
    # Keys and values, 2 layers, 2 heads of 10 numbers of 4 bytes, 24 slots.
    assert [row["context_bytes_per_clip"] for row in facts["groups"]] == [2 * 2 * 2 * 10 * 4 * 24, 2 * 2 * 10 * 4 * 24]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "model")])
    assert "patches: 24 vectors per clip" in shown.stdout
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "model"), "--views", "4x3"])
    assert "is a captioner: leave out --views" in str(refused.exception)
