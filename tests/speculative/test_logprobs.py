"""Log-probabilities of kept tokens: those of the text scored again as a whole, whatever drafted it and how it was drawn."""

import json

import pytest
import torch

import modicum
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.decode import loop as plain_loop
from modicum.decode.logprobs import TokenLogprob, logprob_columns, read_logprobs
from modicum.errors import UsageError
from modicum.train.tokenizer import tokenizer_files, train_tokenizer
from tests.helpers import perturbed, prompts, tiny, tiny_t5

DRAWN = {"temperature": [0.0, 0.7, 1.3], "top_k": 11, "repetition_penalty": 0.7}


def rescored(model, prompt, tokens, vocab_size=None):
    """log-softmax of the model's own logits at every new token, from one call without a cache: [len(tokens), V]."""
    with torch.inference_mode():
        if hasattr(model, "read"):
            begun = torch.tensor([[model.config.decoder_start_id, *tokens]])
            logits = model(torch.tensor([prompt]), begun)[0, :-1]
        else:
            logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        return logits[:, :vocab_size].float().log_softmax(-1)


def assert_rescored(model, given, out, n_top, tolerance=3e-5, vocab_size=None):
    for prompt, tokens, logprobs in zip(given, out.tokens, out.logprobs, strict=True):
        assert [item.token for item in logprobs] == tokens
        for item, expected_V in zip(logprobs, rescored(model, prompt, tokens, vocab_size), strict=True):
            assert item.logprob == pytest.approx(float(expected_V[item.token]), abs=tolerance)
            values = [value for _, value in item.top]
            assert values == pytest.approx(expected_V.topk(n_top).values.tolist(), abs=tolerance)
            assert values == pytest.approx([float(expected_V[token]) for token, _ in item.top], abs=tolerance)
            assert len({token for token, _ in item.top}) == n_top


@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
@pytest.mark.parametrize(("settings", "n_top"), [({"temperature": 0}, 1), (DRAWN, 5)])
def test_they_are_those_of_the_text_scored_again(drafter, settings, n_top):
    target = tiny()
    draft = perturbed(target, 5, 0.06) if drafter == "model" else drafter
    # Repetitive prompts, so that n-grams match and some of them are accepted.
    given = [[3, 1, 4, 3, 1, 4, 3], [5], prompts([17])[0]]
    call = {"draft": draft, "num_draft_tokens": 3, "max_new_tokens": 23, "seed": 8, **settings}
    out = modicum.generate(target, given, logprobs=n_top, **call)
    if drafter:
        assert out.stats.accepted > 3  # accepted, corrected and bonus tokens are all among them
        assert out.stats.rejected > 3
    assert_rescored(target, given, out, n_top)
    without = modicum.generate(target, given, **call)
    assert (without.tokens, without.logprobs) == (out.tokens, None)


@pytest.mark.parametrize("mistake", ["position", "temperature"])
def test_the_comparison_notices_a_mistake(mistake, monkeypatch):
    """Positive control: logits of the position before, or after a temperature."""

    def mistaken(logits_BNV, tokens_BN, n_top):
        wrong = logits_BNV.roll(1, dims=1) if mistake == "position" else logits_BNV / 0.9
        return logprob_columns(wrong, tokens_BN, n_top)

    monkeypatch.setattr(plain_loop, "logprob_columns", mistaken)
    target = tiny()
    out = modicum.generate(target, [[3, 1, 4]], draft=target, temperature=0, max_new_tokens=12, logprobs=2)
    with pytest.raises(AssertionError):
        assert_rescored(target, [[3, 1, 4]], out, 2)


@pytest.mark.parametrize("drafter", [None, "model"])
def test_eos_inside_a_draft_ends_them(drafter):
    target = tiny()
    draft = target if drafter else None
    plain = modicum.generate(target, [[1, 2, 3]], temperature=0, max_new_tokens=30).tokens[0]
    target.eos_ids = frozenset({plain[7]})
    events = []
    out = modicum.generate(
        target, [[1, 2, 3]], draft=draft, temperature=0, max_new_tokens=30, logprobs=3, on_token=events.append
    )
    assert out.tokens[0] == plain[: plain.index(plain[7]) + 1]
    assert_rescored(target, [[1, 2, 3]], out, 3)
    assert [event.logprob for event in events] == out.logprobs[0]


def test_stop_strings_end_them_and_padded_ids_have_no_share():
    target = tiny(vocab_size=300)
    target.files = tokenizer_files(train_tokenizer(["def f(x):\n    return x\n"] * 5, 280), 97)
    target.tokenizer = Tokenizer.from_files(target.files, {})
    size = len(target.tokenizer)
    assert size < 300
    call = {"temperature": 0, "max_new_tokens": 20}
    whole = modicum.generate(target, "def f", **call)
    stop = whole.texts[0][5:7]
    for draft in (None, target):
        out = modicum.generate(target, "def f", draft=draft, stop=stop, logprobs=2, **call)
        assert out.finish_reasons == ["stop"]
        assert len(out.tokens[0]) < 20
        assert_rescored(target, [target.tokenizer.encode("def f")], out, 2, vocab_size=size)


def test_of_a_t5_and_in_bfloat16():
    t5 = tiny_t5()
    given = prompts([4, 9])
    out = modicum.generate(
        t5, given, draft=perturbed(t5, 2, 0.05), max_new_tokens=9, seed=2, ignore_eos=True, logprobs=3
    )
    assert_rescored(t5, given, out, 3)
    half = tiny().to(torch.bfloat16)
    out = modicum.generate(half, given, max_new_tokens=9, seed=2, logprobs=3)
    # The logits are rounded to bfloat16, and kernels of several rows round them otherwise; the softmax is not.
    assert_rescored(half, given, out, 3, tolerance=0.2)
    assert all(len(f"{item.logprob:.17g}") > 8 for row in out.logprobs for item in row)


def test_by_hand():
    # Three positions of which two are kept; ids 1 and 3 are equal, and lower ids come first.
    logits = torch.tensor([[[0.0, 1.0, -1.0, 1.0], [2.0, 0.0, -torch.inf, 0.0], [9.0, 9.0, 9.0, 9.0]]])
    columns = logprob_columns(logits, torch.tensor([[3, 0, 1]]), 4)
    assert (columns.dtype, columns.shape) == (torch.int64, (1, 3 * 9))
    first, second = read_logprobs(columns, [[3, 0]], 4)[0]
    # log(1 + 2e + 1/e) = 1.917575..., log(e^2 + 2) = 2.239544...
    assert first.logprob == pytest.approx(1 - 1.9175758, abs=1e-6)
    assert [token for token, _ in first.top] == [1, 3, 0, 2]
    assert second.logprob == pytest.approx(2 - 2.2395447, abs=1e-6)
    assert second.top[-1] == (2, -torch.inf)
    written = json.loads(json.dumps(second.to_dict()))
    assert written == {
        "token": 0,
        "logprob": second.logprob,
        "top": [[i, None if i == 2 else v] for i, v in second.top],
    }
    assert TokenLogprob(1, -0.5, [(1, -0.5)]).to_dict() == {"token": 1, "logprob": -0.5, "top": [[1, -0.5]]}


def test_they_are_in_the_json_only_if_asked_for():
    target = tiny()
    out = modicum.generate(target, [[1], [2, 3]], max_new_tokens=2, temperature=0, logprobs=1)
    written = json.loads(json.dumps(out.to_dict()))
    assert [[item["token"] for item in row] for row in written["logprobs"]] == out.tokens
    assert "logprobs" not in modicum.generate(target, [[1]], max_new_tokens=2).to_dict()


@pytest.mark.parametrize("wrong", [-1, 30, 1.5, True, "2"])
def test_refusals(wrong):
    with pytest.raises(UsageError, match="logprobs is .*: give 0 for none, or how many .* at most the vocabulary's 29"):
        modicum.generate(tiny(), [[1]], logprobs=wrong)
    assert len(modicum.generate(tiny(), [[1]], max_new_tokens=1, logprobs=29).logprobs[0][0].top) == 29
