"""A family without native code, run through `transformers`: OPT."""

import pytest
import torch
import transformers

import modicum
from modicum.errors import UsageError
from tests.helpers import prompts


@pytest.fixture
def opt(tmp_path):
    config = transformers.OPTConfig(
        vocab_size=53,
        hidden_size=20,
        ffn_dim=31,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=47,
        word_embed_proj_dim=20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "opt")
    return model, modicum.load(tmp_path / "opt")


def test_greedy_equals_transformers_in_any_batch(opt):
    theirs, ours = opt
    given = prompts([5, 1, 9, 5, 2], vocab_size=53)
    out = modicum.generate(ours, given, temperature=0, max_new_tokens=13)
    for prompt, tokens in zip(given, out.tokens, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=13)
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("drafter", ["ngram", "itself"])
def test_speculation_row_by_row(opt, drafter):
    _, ours = opt
    given = prompts([5, 1, 9], vocab_size=53)
    plain = modicum.generate(ours, given, temperature=0, max_new_tokens=15)
    out = modicum.generate(
        ours, given, draft=ours if drafter == "itself" else drafter, temperature=0, max_new_tokens=15
    )
    assert out.tokens == plain.tokens
    if drafter == "itself":
        assert out.stats.tokens_per_target_call == 5


def test_a_state_that_cannot_be_cropped_is_refused(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=53, hidden_size=16, state_size=4, num_hidden_layers=2, max_position_embeddings=64
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    model = modicum.load(tmp_path / "mamba")
    with pytest.raises(UsageError, match="cannot be rolled back after a rejected draft: generate without a draft"):
        modicum.generate(model, [[1, 2, 3]], draft="ngram")


def test_saving_is_left_to_transformers(opt, tmp_path):
    with pytest.raises(UsageError, match="save_pretrained"):
        modicum.save(opt[1], tmp_path / "again")
