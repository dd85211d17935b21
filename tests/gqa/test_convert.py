"""Conversion to fewer key-value heads: by hand, against pooled modules in every family, and in transformers."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import transformers

import modicum
from modicum.checkpoint.io import Checkpoint
from modicum.errors import CheckpointError, UsageError
from modicum.gqa.convert import first, mean, random
from modicum.gqa.heads import AttentionWeights, put, take
from modicum.gqa.heads import places as places_of
from tests.parity import t5
from tests.parity.families import CASES, make
from tests.vivit.tiny import KINDS, clip, name_of, tiny_vivit

IDS = torch.tensor([[3, 17, 5, 44, 9, 2, 60, 31], [1, 1, 58, 7, 23, 40, 12, 0]])


def layer(n_heads=4, K=2, D=3):
    """Key head h is all h + 1, value head h all 10 (h + 1); biases a tenth of that."""
    heads = torch.arange(1.0, n_heads + 1).view(-1, 1, 1)
    return AttentionWeights(
        q=torch.randn(n_heads, K, D),
        k=heads.expand(-1, K, D).clone(),
        v=10 * heads.expand(-1, K, D).clone(),
        o=torch.randn(D, n_heads, K),
        k_bias=heads[..., 0].expand(-1, K) / 10,
        v_bias=heads[..., 0].expand(-1, K).clone(),
    )


def test_by_hand():
    pooled = mean(layer(), 2, 0)
    # Neighbours share: heads 1, 2 and heads 3, 4; not 1, 3 and 2, 4.
    assert pooled.k[:, 0, 0].tolist() == [1.5, 3.5]
    assert pooled.v[:, 1, 2].tolist() == [15, 35]
    assert pooled.k_bias[:, 1].tolist() == pytest.approx([0.15, 0.35])
    assert pooled.v_bias[:, 0].tolist() == [1.5, 3.5]
    assert first(layer(), 2, 0).v[:, 0, 0].tolist() == [10, 30]
    assert mean(layer(), 1, 0).k[:, 0, 0].tolist() == [2.5]
    assert torch.equal(pooled.q, pooled.q)


def test_random_is_as_wide_as_what_it_replaces():
    weights = AttentionWeights(*(torch.randn(8, 64, 128) * scale for scale in (1, 0.02, 3)), o=torch.zeros(1))
    drawn, again, other = random(weights, 2, 5), random(weights, 2, 5), random(weights, 2, 6)
    assert drawn.k.shape == (2, 64, 128)
    assert drawn.k.std().item() == pytest.approx(0.02, rel=0.03)
    assert drawn.v.std().item() == pytest.approx(3, rel=0.03)
    assert torch.equal(drawn.k, again.k)
    assert not torch.equal(drawn.k, other.k)


def test_layers_are_taken_apart_and_put_together(tmp_path):
    make("gpt2", tmp_path / "gpt2")
    model = modicum.load(tmp_path / "gpt2")
    state = model.dense_state()
    for place in places_of(model.config):
        weights = take(state, place)
        assert weights.q.shape == (4, 10, 40)
        # A head's output rows are the columns of the output projection that read it.
        assert torch.equal(weights.o[:, 1], state[f"{place.prefix}.out.weight"][:, 10:20])
        assert all(torch.equal(tensor, state[name]) for name, tensor in put(weights, place).items())


def pooled_state(model, n_kv_heads, method):
    """Three lines that know nothing of the code under test."""
    state = {name: tensor.clone() for name, tensor in model.dense_state().items()}
    for name, tensor in state.items():
        if ".project.k." in name or ".project.v." in name:
            width = model.config.head_dim
            groups = tensor.reshape(n_kv_heads, -1, width, *tensor.shape[1:])
            state[name] = (groups.mean(1) if method == "mean" else groups[:, 0]).flatten(0, 1)
    return state


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["mean", "first"])
def test_every_family(case, method, tmp_path):
    make(case, tmp_path / "source")
    model = modicum.load(tmp_path / "source")
    groups = max(1, model.config.n_kv_heads // 2)
    converted = modicum.convert_to_gqa(modicum.read_checkpoint(tmp_path / "source"), groups, method)
    modicum.write_checkpoint(converted, tmp_path / "converted")
    loaded = modicum.load(tmp_path / "converted")
    assert loaded.config == replace(model.config, n_kv_heads=groups)
    expected = pooled_state(model, groups, method)
    state = loaded.dense_state()
    assert state.keys() == expected.keys()
    assert all(torch.allclose(state[name], expected[name], atol=1e-7) for name in expected)
    with torch.no_grad():
        assert torch.isfinite(loaded(IDS)).all()
        if groups < model.config.n_kv_heads:
            assert (loaded(IDS) - model(IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_t5_shares_in_its_decoder_alone(case, method, tmp_path):
    t5.make(case, tmp_path / "source")
    model = modicum.load(tmp_path / "source")
    converted = modicum.convert_to_gqa(modicum.read_checkpoint(tmp_path / "source"), 2, method)
    modicum.write_checkpoint(converted, tmp_path / "converted")
    loaded = modicum.load(tmp_path / "converted")
    assert loaded.config == replace(model.config, n_kv_heads=2)
    assert converted.config["num_key_value_heads"] == 2
    state, source = loaded.dense_state(), model.dense_state()
    shared = {name for name in source if name.startswith("decoder.") and name.endswith(("k.weight", "v.weight"))}
    assert len(shared) == 2 * 2 * 2  # layers, self- and cross-attention, keys and values
    assert {name for name in state if state[name].shape != source[name].shape} == shared
    assert all(torch.equal(state[name], source[name]) for name in state if name not in shared)
    if method != "random":
        for name in shared:
            groups = source[name].reshape(2, 2, 14, 40)
            torch.testing.assert_close(
                state[name], (groups.mean(1) if method == "mean" else groups[:, 0]).flatten(0, 1)
            )
    with torch.no_grad():
        difference = (loaded(IDS, IDS[:, :5]) - model(IDS, IDS[:, :5])).abs().max()
    assert 1e-3 < difference < torch.inf
    cache = loaded.new_cache(2, 9)
    loaded.read([[1, 2, 3], [4]], cache)
    assert cache.k_NBGMK.shape == (2, 2, 2, 9, 14)
    assert cache.context.k_NBGMK.shape == (2, 2, 2, 3, 14)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in ("gpt2", "gpt_neox")])
def test_transformers_loads_it_unchanged(case, tmp_path):
    make(case, tmp_path / "source")
    converted = modicum.convert_to_gqa(modicum.read_checkpoint(tmp_path / "source"), 1)
    modicum.write_checkpoint(converted, tmp_path / "converted")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert theirs.config.num_key_value_heads == 1
    with torch.no_grad():
        difference = (theirs(IDS).logits - modicum.load(tmp_path / "converted")(IDS)).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_as_many_heads_as_before_change_nothing(method, tmp_path):
    make("llama", tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    converted = modicum.convert_to_gqa(source, 2, method)
    assert converted.config == source.config
    assert set(converted.state_dict) == set(source.state_dict)
    assert all(torch.equal(converted.state_dict[name], source.state_dict[name]) for name in source.state_dict)


@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_that_are_equal_already_lose_nothing(method, tmp_path):
    make("llama-multi-head", tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    state = dict(source.state_dict)
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.reshape(2, 2, 10, 40)[:, :1].expand(-1, 2, -1, -1).reshape(40, 40)
    modicum.write_checkpoint(Checkpoint(source.config, state, {}), tmp_path / "planted")
    planted = modicum.read_checkpoint(tmp_path / "planted")
    modicum.write_checkpoint(modicum.convert_to_gqa(planted, 2, method), tmp_path / "converted")
    with torch.no_grad():
        difference = modicum.load(tmp_path / "converted")(IDS) - modicum.load(tmp_path / "planted")(IDS)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_video_models(kind, tmp_path):
    model = tiny_vivit(**kind)
    groups = 2 if kind["variant"] == "factorized_dot_product" else 1
    modicum.save(model, tmp_path / "source")
    modicum.write_checkpoint(
        modicum.convert_to_gqa(modicum.read_checkpoint(tmp_path / "source"), groups), tmp_path / "converted"
    )
    loaded = modicum.load(tmp_path / "converted")
    assert loaded.config.n_kv_heads == groups
    with torch.no_grad():
        assert torch.isfinite(loaded(clip())).all()
    for place in places_of(model.config):
        before, after = (take(m.dense_state(), p) for m, p in ((model, place), (loaded, after_of(loaded, place))))
        expected = before.k.unflatten(0, (after.n_kv_heads, -1)).mean(1)
        torch.testing.assert_close(after.k, expected)


def after_of(model, place):
    return next(other for other in places_of(model.config) if other.prefix == place.prefix)


class Counting(Mapping):
    """A state dict that knows how many of its tensors are alive."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.inner[name]

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


def test_tensors_are_made_when_they_are_asked_for(tmp_path):
    make("llama", tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    counting = Counting(source.state_dict)
    converted = modicum.convert_to_gqa(Checkpoint(source.config, counting, {}), 1)
    assert counting.asked == []
    assert converted.state_dict["model.layers.1.self_attn.k_proj.weight"].shape == (10, 40)
    assert {name.split(".")[2] for name in counting.asked} == {"1"}
    counting.asked.clear()
    converted.state_dict["model.embed_tokens.weight"]
    assert counting.asked == ["model.embed_tokens.weight"]


def test_refusals(tmp_path):
    make("llama-multi-head", tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    with pytest.raises(UsageError, match="3 key-value heads do not divide the checkpoint's 4: choose one of 1, 2, 4"):
        modicum.convert_to_gqa(source, 3)
    with pytest.raises(UsageError, match="8 key-value heads do not divide"):
        modicum.convert_to_gqa(source, 8)
    with pytest.raises(UsageError, match="`method` is 'meen': did you mean `mean`"):
        modicum.convert_to_gqa(source, 2, "meen")


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ({"model_type": "bloom"}, {}, "takes each head's positions from the head's number .ALiBi."),
        ({"model_type": "mpt"}, {}, "ALiBi"),
        (
            {"model_type": "llama"},
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)},
            "merge them into it",
        ),
        ({"peft_type": "LORA"}, {}, "merge them into it first"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, {}, "weights are quantised"),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, {}, "caps logits"),
        ({"model_type": "mamba"}, {}, "families with native code are"),
    ],
)
def test_what_cannot_be_converted(config, tensors, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        modicum.convert_to_gqa(Checkpoint(config, tensors, {}), 1)
