"""Speculative generation through the public call: greedy identity, exact distribution, limits, seeds."""

from collections import Counter

import pytest
import torch

import modicum
from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.errors import GenerationError, UsageError
from tests.helpers import perturbed, prompts, tiny
from tests.parity.families import CASES, make

GREEDY = {"temperature": 0, "max_new_tokens": 23}


def logits_along(model, prompt, tokens):
    """The plain model's logits at every generated position, [len(tokens), V]."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]


def assert_greedy_equal(model, given, expected, tokens):
    """Equal token for token, but for the first place where the plain run's top two are a tie within 1e-4 of the scale."""
    for prompt, plain, speculative in zip(given, expected, tokens, strict=True):
        if plain == speculative:
            continue
        at = next(i for i, (a, b) in enumerate(zip(plain, speculative, strict=True)) if a != b)
        logits = logits_along(model, prompt, plain)[at]
        first, second = logits.topk(2).values
        print(f"near-tie at {at}: {first} {second}")
        assert first - second <= 1e-4 * logits.abs().max(), (plain, speculative)


@pytest.mark.parametrize("case", CASES)
def test_greedy_identity_in_every_family(case, tmp_path):
    make(case, tmp_path)
    target = modicum.load(tmp_path)
    draft = perturbed(modicum.load(tmp_path), 5, 0.05)
    given = prompts([5, 1, 17, 9, 2], vocab_size=61)
    expected = modicum.generate(target, given, **GREEDY).tokens
    for drafter in (draft, "ngram"):
        for k in range(1, 9):
            batch = given[: 1 + k % 5]
            out = modicum.generate(target, batch, draft=drafter, num_draft_tokens=k, **GREEDY)
            assert_greedy_equal(target, batch, expected[: len(batch)], out.tokens)
            assert [len(tokens) for tokens in out.tokens] == [23] * len(batch)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_draft_that_is_the_target_is_always_accepted(k, batch):
    target = tiny()
    given = prompts([3, 11, 7, 1, 19][:batch])
    for temperature in (0, 0.9):
        settings = {"temperature": temperature, "max_new_tokens": 10 * (k + 1), "seed": 1}
        out = modicum.generate(target, given, draft=target, num_draft_tokens=k, **settings)
        assert out.stats.tokens_per_target_call == k + 1
        assert out.stats.acceptance_rate == 1
        assert [stats.target_calls for stats in out.row_stats] == [10] * batch


def test_fifty_tokens_with_four_drafted_are_ten_loops():
    target = tiny()
    out = modicum.generate(target, [[1, 2, 3]], draft=target, max_new_tokens=50, temperature=0)
    stats = out.row_stats[0]
    assert (stats.target_calls, stats.draft_calls, stats.tokens_per_target_call) == (10, 40, 5.0)
    assert len(out.tokens[0]) == 50


def chi_square(counts: Counter, probs: dict, n: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom, cells expected fewer than 5 times pooled."""
    cells, pooled_count, pooled = [], 0, 0.0
    for outcome, probability in probs.items():
        if probability * n < 5:
            pooled, pooled_count = pooled + probability, pooled_count + counts[outcome]
        else:
            cells.append((counts[outcome], probability * n))
    if pooled > 0:
        cells.append((pooled_count, pooled * n))
    return sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1


def limit(freedom: int) -> float:
    """A value that chi-square exceeds with probability below 1e-6 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


def pair_probs(model, prompt, **settings):
    """The exact distribution of the next three tokens."""
    vocab = model.config.vocab_size
    sampler = Sampler([SamplingParams(**settings)], torch.device("cpu"))
    probs = {}
    with torch.inference_mode():
        first = sampler.probs(model(torch.tensor([prompt]))[:, -1].double())[0]
        for a in range(vocab):
            second = sampler.probs(model(torch.tensor([[*prompt, a]]))[:, -1].double())[0]
            for b in range(vocab):
                third = sampler.probs(model(torch.tensor([[*prompt, a, b]]))[:, -1].double())[0]
                for c in range(vocab):
                    probs[a, b, c] = float(first[a] * second[b] * third[c])
    return probs


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_sampled_distribution_is_the_targets(drafter):
    """10^5 texts of three tokens through the public call: all of their joint distribution, chi-square."""
    target = tiny(vocab_size=5, scale=0.5)
    draft = perturbed(target, 9, 0.2) if drafter == "model" else "ngram"
    n, prompt, settings = 100_000, [1, 3, 1, 3], {"temperature": 0.8, "top_p": 0.95}
    out = modicum.generate(target, [prompt] * n, draft=draft, num_draft_tokens=2, max_new_tokens=3, seed=11, **settings)
    assert 0.2 < out.stats.acceptance_rate < 0.98
    probs = pair_probs(target, prompt, **settings)
    counts = Counter(map(tuple, out.tokens))
    assert all(probs[outcome] > 0 for outcome in counts)
    statistic, freedom = chi_square(counts, probs, n)
    assert statistic < limit(freedom)
    # Positive control: the same texts are not from a slightly different temperature.
    other = pair_probs(target, prompt, **{**settings, "temperature": 0.84})
    statistic, freedom = chi_square(counts, other, n)
    assert statistic > limit(freedom)


@pytest.mark.parametrize("tampered", ["residual", "ratio"])
def test_the_distribution_test_notices_a_broken_rule(tampered, monkeypatch):
    """Positive control: with the rule tampered with, the chi-square test fails."""
    from modicum.speculative import loop
    from modicum.speculative.accept import accept

    def broken(target_probs, tokens, draft_probs, drafted, noise):
        if tampered == "residual":  # recover from the target instead of the residual
            rule = accept(target_probs, tokens, draft_probs, drafted, noise)
            none = torch.zeros_like(drafted)
            at = rule.n_accepted_B[:, None, None].expand(-1, 1, target_probs.shape[-1])
            plain = accept(target_probs.gather(1, at), tokens[:, :0], None, none, noise[:, :1])
            return type(rule)(rule.n_accepted_B, plain.next_token_B, rule.valid_B)
        noise = noise.clone()
        noise[..., Purpose.COIN] **= 2  # accepts more often than min(1, target / draft)
        return accept(target_probs, tokens, draft_probs, drafted, noise)

    monkeypatch.setattr(loop, "accept", broken)
    target = tiny(vocab_size=5, scale=0.5)
    out = modicum.generate(
        target, [[1, 3]] * 30_000, draft=perturbed(target, 9, 0.3), num_draft_tokens=2, max_new_tokens=3, seed=2
    )
    statistic, freedom = chi_square(Counter(map(tuple, out.tokens)), pair_probs(target, [1, 3]), 30_000)
    assert statistic > limit(freedom)


@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_same_seed_same_text_whatever_the_batch(drafter):
    target = tiny()
    draft = perturbed(target, 5, 0.1) if drafter == "model" else drafter
    given = prompts([5, 1, 17, 9, 2, 30])
    mixed = [0.7, 1.0, 0.0, 1.3, 0.9, 1.0]
    settings = {"draft": draft, "num_draft_tokens": 3, "top_k": 13, "repetition_penalty": 1.2}
    together = modicum.generate(target, given, temperature=mixed, seed=42, max_new_tokens=19, **settings)
    for index, prompt in enumerate(given):
        # An unrelated neighbour, another place in the call, other limits for it: nothing of that may show.
        alone = modicum.generate(
            target,
            [[7, 7], prompt],
            temperature=[1.0, mixed[index]],
            max_new_tokens=[3 + index, 19],
            seed=[1, stream(42, index)],
            **settings,
        )
        single = modicum.generate(
            target, [prompt], temperature=mixed[index], max_new_tokens=19, seed=[stream(42, index)], **settings
        )
        assert single.tokens[0] == alone.tokens[1]
    again = modicum.generate(target, given, temperature=mixed, seed=42, max_new_tokens=19, **settings)
    assert again.tokens == together.tokens
    first = modicum.generate(target, given[:1], temperature=mixed[0], seed=42, max_new_tokens=19, **settings)
    assert first.tokens[0] == together.tokens[0]


def stream(seed, index):
    return seed * 1000 + index


@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_eos_inside_a_draft_ends_the_text_there(drafter):
    target = tiny()
    draft = target if drafter == "model" else drafter
    plain = modicum.generate(target, [[1, 2, 3]], temperature=0, max_new_tokens=30).tokens[0]
    eos = plain[7]
    target.eos_ids = frozenset({eos})
    out = modicum.generate(target, [[1, 2, 3]], draft=draft, temperature=0, max_new_tokens=30)
    end = plain.index(eos) + 1
    assert out.tokens[0] == plain[:end]
    assert out.finish_reasons == ["eos"]
    assert out.stats.tokens == end
    ignoring = modicum.generate(target, [[1, 2, 3]], draft=draft, temperature=0, max_new_tokens=30, ignore_eos=True)
    assert ignoring.tokens[0] == plain


@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_limits_are_exact(drafter):
    target = tiny()
    draft = perturbed(target, 5, 0.02) if drafter == "model" else drafter
    lengths = [1, 90, 96, 50]
    out = modicum.generate(target, prompts(lengths), draft=draft, num_draft_tokens=5, max_new_tokens=43, temperature=0)
    assert [len(tokens) for tokens in out.tokens] == [43, 7, 1, 43]
    assert out.finish_reasons == ["length"] * 4


def test_a_draft_with_a_shorter_context_stops_drafting():
    target, draft = tiny(), tiny(1, max_seq_len=31)
    given = prompts([5, 40])
    out = modicum.generate(target, given, draft=draft, **{**GREEDY, "max_new_tokens": 50})
    assert out.tokens == modicum.generate(target, given, **{**GREEDY, "max_new_tokens": 50}).tokens
    assert out.row_stats[1].acceptance_rate is None


def test_padded_vocabularies_are_not_drawn_from():
    target, wide, narrow = tiny(), tiny(1, vocab_size=37), tiny(2, vocab_size=23)
    given = prompts([5, 3], vocab_size=23)
    for draft in (wide, narrow):
        out = modicum.generate(target, given, draft=draft, **GREEDY)
        assert out.tokens == modicum.generate(target, given, **GREEDY).tokens
        sampled = modicum.generate(target, given, draft=draft, temperature=2.0, max_new_tokens=40, seed=1)
        assert max(map(max, sampled.tokens)) < 29


def test_on_token_tells_draft_from_target():
    target = tiny()
    events = []
    out = modicum.generate(target, [[1, 2]], draft=target, max_new_tokens=10, temperature=0, on_token=events.append)
    assert [event.token for event in events] == out.tokens[0]
    assert [event.source for event in events] == (["draft"] * 4 + ["target"]) * 2
    events.clear()
    modicum.generate(target, [[1, 2]], max_new_tokens=3, temperature=0, on_token=events.append)
    assert [event.source for event in events] == ["plain"] * 3


def test_many_short_prompts_in_one_call():
    target = tiny(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, rope=None)
    given = prompts([1 + i % 3 for i in range(20_000)])
    out = modicum.generate(target, given, draft="ngram", max_new_tokens=3, temperature=0)
    assert len(out.tokens) == 20_000
    assert all(len(tokens) == 3 for tokens in out.tokens)
    some = [17, 4711, 19_999]
    alone = modicum.generate(target, [given[i] for i in some], max_new_tokens=3, temperature=0)
    assert [out.tokens[i] for i in some] == alone.tokens


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_logits_that_allow_no_token_are_refused(broken, monkeypatch):
    target = tiny()
    whole = type(target).forward
    monkeypatch.setattr(type(target), "forward", lambda *args, **kwargs: whole(*args, **kwargs) * 0 + broken)
    for settings in ({"temperature": 0}, {"temperature": 1.0}):
        for draft in (None, "ngram"):
            with pytest.raises(GenerationError, match="NaN"):
                modicum.generate(target, [[1, 2]], draft=draft, **settings)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0: it must be"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": []}, None),
        ({"prompts": [[1], [99]]}, "prompt 1 has token ids"),
        ({"prompts": [[1] * 97]}, "97 tokens and the model's context is 97: shorten it to at most 96"),
        ({"prompts": "text"}, "no tokenizer files"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": [1.0, 2.0]}, "2 values for 1 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"draft": "lookup"}, "`lookup` is not a drafter's name"),
        ({"stop": "x"}, "no tokenizer files"),
        ({"verification": "tree"}, "verification `tree`"),
    ],
)
def test_refusals(arguments, sentence):
    call = {"prompts": [[1, 2]], "draft": "ngram", **arguments}
    if sentence is None:
        assert modicum.generate(tiny(), **call).tokens == []
        return
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        modicum.generate(tiny(), **call)


def test_a_pair_names_the_stream_of_any_place():
    target, given = tiny(), prompts([5, 3, 8])
    whole = modicum.generate(target, given, seed=42, max_new_tokens=9)
    for index, prompt in enumerate(given):
        alone = modicum.generate(target, [prompt], seed=[(42, index)], max_new_tokens=9)
        assert alone.tokens[0] == whole.tokens[index]
    assert modicum.generate(target, given[:1], seed=[42], max_new_tokens=9).tokens[0] == whole.tokens[0]
