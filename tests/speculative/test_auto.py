"""`num_draft_tokens="auto"` through the public call, with costs by hand so that K follows from the text alone."""

import itertools
import json
from collections import Counter, defaultdict

import pytest
import torch

import modicum
from modicum.decode import prompts as prompts_module
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.errors import UsageError
from modicum.speculative import auto
from modicum.speculative.accept import accept
from modicum.speculative.drafters import model as model_module
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.lookahead import Lookahead
from tests.helpers import perturbed, prompts, tiny, tiny_t5
from tests.speculative.drafters import NAMES, drafter
from tests.speculative.enumeration import chance, distance, joint, points, random_rows
from tests.speculative.tables import linear
from tests.speculative.test_generate import assert_greedy_equal, chi_square, limit


class Untimed(Lookahead):
    """Loops take exactly what the table says, whatever the clock."""

    def record(self, k, judged, accepted, *, unread, begun, **_):
        draft = self.draft_costs[k] + (self.costs.read(1, unread) if k and begun else 0.0)
        seconds = self.verify_costs[k] + draft
        super().record(k, judged, accepted, seconds=seconds, draft_seconds=draft, unread=unread, begun=begun)


@pytest.fixture
def costs(monkeypatch):
    """Sets the costs of whatever is generated next."""
    monkeypatch.setattr(auto, "Lookahead", Untimed)

    def use(table):
        monkeypatch.setattr(auto, "MeasuredCosts", lambda target, drafter: table)

    use(linear(0.02, 0.1, 0.005))
    return use


class Scripted:
    """K by a list, over and over; stands in for a lookahead."""

    max_k = 5

    def __init__(self, ks):
        self.ks, self.costs, self.recorded = itertools.cycle(ks), linear(0, 0), []

    def begin(self, n_rows, planned):
        self.n_rows = n_rows

    def choose(self, limits, unread=0, *, begun=True):
        self.unread = unread
        return min(next(self.ks), max(limits()))

    def record(self, k, judged, accepted, **times):
        assert len(judged) == len(accepted) == self.n_rows
        assert times["seconds"] >= times["draft_seconds"] >= 0
        self.recorded.append((k, times["unread"], times["begun"]))

    def keep(self, rows):
        self.n_rows = len(rows)


def script(monkeypatch, *ks):
    chooser = Scripted(ks)
    monkeypatch.setattr(auto, "Lookahead", lambda costs: chooser)
    return chooser


@pytest.mark.parametrize("drafter", ["good", "bad", "ngram"])
def test_greedy_identity(drafter, costs):
    target = tiny()
    draft = {"good": perturbed(target, 5, 0.02), "bad": perturbed(target, 5, 0.3)}.get(drafter, drafter)
    given = prompts([5, 1, 17, 9, 2])
    settings = {"temperature": 0, "max_new_tokens": 70}
    expected = modicum.generate(target, given, **settings).tokens
    for table in (linear(0.02, 0.1, 0.005), linear(0.3, 0.02), linear(0.0, 0.0)):
        costs(table)
        for size in (1, 2, 5):
            out = modicum.generate(target, given[:size], draft=draft, num_draft_tokens="auto", **settings)
            assert_greedy_equal(target, given[:size], expected[:size], out.tokens)
            assert [sum(stats.loops_by_k.values()) for stats in out.row_stats] == [
                stats.target_calls for stats in out.row_stats
            ]
            if drafter == "good":
                assert len(out.stats.loops_by_k) >= 3, "K was hardly ever changed"


@pytest.mark.parametrize("ks", [(0, 3, 0, 0, 5, 1), (2, *[0] * 25, 4), (2, 0)])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_after_pauses_a_draft_that_is_the_target_is_still_always_accepted(ks, temperature, monkeypatch):
    """A draft that read one token too few or too many after a pause would be a worse draft, and nothing else."""
    target = tiny()
    chooser = script(monkeypatch, *ks)
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 7)
    settings = {"temperature": temperature, "max_new_tokens": 60, "seed": 1}
    out = modicum.generate(target, prompts([3, 11, 7]), draft=target, num_draft_tokens="auto", **settings)
    assert out.stats.acceptance_rate == 1
    assert [len(tokens) for tokens in out.tokens] == [60] * 3
    pauses = {unread for k, unread, begun in chooser.recorded if k and begun}
    assert max(pauses) == max(len(list(group)) for zero, group in itertools.groupby(ks * 2, bool) if not zero)


def test_a_ragged_batch_pauses_and_goes_on(monkeypatch):
    target = tiny()
    draft = perturbed(target, 5, 0.05)
    given = prompts([5, 1, 17])
    settings = {"temperature": 0, "max_new_tokens": [61, 17, 40]}
    expected = modicum.generate(target, given, **settings).tokens
    script(monkeypatch, 0, 4, 3, 0, 0, 0, 0, 5)
    out = modicum.generate(target, given, draft=draft, num_draft_tokens="auto", **settings)
    assert_greedy_equal(target, given, expected, out.tokens)
    assert 0.2 < out.stats.acceptance_rate < 1


def test_where_drafting_cannot_pay_the_draft_is_never_called(costs, monkeypatch):
    target, draft = tiny(), tiny(1)
    costs(linear(0.0, 1.2))
    monkeypatch.setattr(type(draft), "forward", refuse_calls_of(draft))
    out = modicum.generate(target, prompts([5, 30]), draft=draft, num_draft_tokens="auto", max_new_tokens=30)
    assert out.stats.draft_calls == 0
    assert out.stats.loops_by_k == {0: 60}
    assert out.stats.mean_k == 0
    # Positive control: where it pays, it is.
    costs(linear(0.0, 0.01))
    with pytest.raises(AssertionError, match="the draft was called"):
        modicum.generate(target, prompts([5]), draft=draft, num_draft_tokens="auto", max_new_tokens=30)


def refuse_calls_of(model):
    whole = type(model).forward

    def forward(self, *args, **kwargs):
        assert self is not model, "the draft was called"
        return whole(self, *args, **kwargs)

    return forward


def test_a_loop_without_a_draft_draws_what_plain_decoding_would(monkeypatch):
    """Its random numbers have the same addresses, so with K = 0 throughout even the text is the same."""
    target, given = tiny(), prompts([5, 1, 17])
    script(monkeypatch, 0)
    settings = {"temperature": 1.1, "seed": 8, "max_new_tokens": 30, "top_k": 7, "repetition_penalty": 1.2}
    out = modicum.generate(target, given, draft=tiny(1), num_draft_tokens="auto", **settings)
    assert out.tokens == modicum.generate(target, given, **settings).tokens


def test_a_drafter_that_watches_the_target_misses_nothing(monkeypatch):
    """Without a draft, too, its loops go the speculative way."""
    target, asked = tiny(), []

    class Watcher(ModelDrafter):
        def observe(self, *_):
            """It has a look at everything, and that is all that matters here."""

        def propose(self, batch, allowed, noise_BNP):
            asked.append(max(allowed))
            return super().propose(batch, allowed, noise_BNP)

    script(monkeypatch, 2, 0, 0)
    settings = {"temperature": 0, "max_new_tokens": 25}
    out = modicum.generate(target, [[1, 2, 3]], draft=Watcher(target), num_draft_tokens="auto", **settings)
    assert out.tokens == modicum.generate(target, [[1, 2, 3]], **settings).tokens
    assert asked[:6] == [2, 0, 0, 2, 0, 0]


def test_the_context_and_the_end_are_exact(costs):
    costs(linear(0.0, 0.01))
    target = tiny()
    good = perturbed(target, 5, 0.02)
    given = prompts([1, 90, 96, 50])
    expected = modicum.generate(target, given, max_new_tokens=43, temperature=0)
    for draft in (good, tiny(1, max_seq_len=31), "ngram"):
        out = modicum.generate(target, given, draft=draft, num_draft_tokens="auto", max_new_tokens=43, temperature=0)
        assert [len(tokens) for tokens in out.tokens] == [43, 7, 1, 43]
        assert out.tokens == expected.tokens
    eos = expected.tokens[0][20]
    target.eos_ids = frozenset({eos})
    settings = {"max_new_tokens": 43, "temperature": 0}
    expected = modicum.generate(target, given, **settings)
    out = modicum.generate(target, given, draft=good, num_draft_tokens="auto", **settings)
    assert (out.tokens, out.finish_reasons) == (expected.tokens, expected.finish_reasons)


def test_an_encoder_decoder_with_auto(costs):
    costs(linear(0.0, 0.01))
    target = tiny_t5()
    draft = perturbed(target, 5, 0.01)
    given, settings = prompts([7, 3, 12]), {"temperature": 0, "max_new_tokens": 30}
    expected = modicum.generate(target, given, **settings).tokens
    out = modicum.generate(target, given, draft=draft, num_draft_tokens="auto", **settings)
    assert out.tokens == expected
    assert max(out.stats.loops_by_k) > 1


def test_batches_of_a_call_learn_from_each_other(costs, monkeypatch):
    """A draft that was always right is asked for more from the first loop of the next batch on."""
    monkeypatch.setattr(prompts_module, "MAX_ROWS", 1)
    costs(linear(0.02, 0.1, 0.005))
    asked, whole = [], ModelDrafter.propose

    def propose(self, batch, allowed, noise_BNP):
        if len(asked) == batch.rows[0].request.index:
            asked.append(max(allowed))
        return whole(self, batch, allowed, noise_BNP)

    monkeypatch.setattr(ModelDrafter, "propose", propose)
    target = tiny()
    modicum.generate(target, [[1, 2], [1, 3]], draft=target, num_draft_tokens="auto", max_new_tokens=50, temperature=0)
    first, second = asked
    assert second > first + 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ks", [(0, 3, 0, 0, 5, 1), (2, *[0] * 20, 4)])
def test_every_drafter_pauses_and_goes_on(name, ks, monkeypatch):
    """Greedy identity, and the drafts are as good as without pauses."""
    target, given = tiny(), prompts([5, 1, 17])
    source = drafter(name, target, noise=0.02)
    settings = {"temperature": 0, "max_new_tokens": 60}
    expected = modicum.generate(target, given, **settings).tokens
    chooser = script(monkeypatch, *ks)
    out = modicum.generate(target, given, draft=source, num_draft_tokens="auto", **settings)
    assert_greedy_equal(target, given, expected, out.tokens)
    # Each was trained for four at a time, and is not asked for a fifth; early exit goes on for ever.
    assert max(k for k, *_ in chooser.recorded) == (5 if name == "self" and 5 in ks else min(4, max(ks)))
    steady = modicum.generate(target, given, draft=source, num_draft_tokens=4, **settings)
    assert out.stats.acceptance_by_position[0] > steady.stats.acceptance_by_position[0] - 0.25


def test_block_verification_and_logprobs_with_auto(costs):
    target, given = tiny(), prompts([5, 1, 17])
    draft = perturbed(target, 5, 0.02)
    settings = {"temperature": 0, "max_new_tokens": 30, "logprobs": 2}
    plain = modicum.generate(target, given, **settings)
    out = modicum.generate(target, given, draft=draft, num_draft_tokens="auto", verification="block", **settings)
    assert out.tokens == plain.tokens
    for got, wanted in zip(out.logprobs, plain.logprobs, strict=True):
        assert [x.logprob for x in got] == pytest.approx([x.logprob for x in wanted], abs=1e-4)
    with pytest.raises(UsageError, match="k_invariant needs a fixed num_draft_tokens, not `auto`"):
        modicum.generate(target, given, draft=draft, num_draft_tokens="auto", k_invariant=True)
    exact = {"draft": draft, "temperature": 0, "max_new_tokens": 30, "bit_exact": True}
    assert modicum.generate(target, given, num_draft_tokens="auto", **exact).tokens == plain.tokens


def test_stats_say_what_was_chosen(monkeypatch):
    script(monkeypatch, 0, 3)
    target = tiny()
    out = modicum.generate(
        target, [[1, 2, 3]] * 2, draft=target, num_draft_tokens="auto", max_new_tokens=20, temperature=0
    )
    stats = out.row_stats[0]
    assert stats.loops_by_k == {0: 4, 3: 4}
    assert stats.mean_k == 1.5
    assert out.stats.loops_by_k == {0: 8, 3: 8}
    written = json.loads(json.dumps(stats.to_dict()))
    assert (written["mean_k"], written["loops_by_k"]) == (1.5, {"0": 4, "3": 4})
    fixed = modicum.generate(target, [[1, 2, 3]], draft=target, max_new_tokens=20, temperature=0).stats
    assert (fixed.mean_k, fixed.to_dict()["loops_by_k"]) == (None, {})


@pytest.mark.parametrize("value", ["fast", "4", "", 0, -2, 2.5, True, None, float("nan")])
def test_other_values_are_refused(value):
    with pytest.raises(UsageError, match=r'num_draft_tokens is .*: it must be a whole number of at least 1, or "auto"'):
        modicum.generate(tiny(), [[1, 2]], draft="ngram", num_draft_tokens=value)


# --- exactness ---


def first_loop(target, draft, n_tokens, C, keep=lambda drawn: len(drawn)):
    """What one loop yields, {text: probability}: `C` drafted tokens, of which `keep` says how many are verified."""
    rows, shares = [], []
    for drawn in itertools.product(range(n_tokens), repeat=C):
        weight, n = chance(draft, (), drawn), keep(drawn)
        targets = torch.stack([target(drawn[:i]) for i in range(C + 1)])
        drafts = torch.stack([draft(drawn[:i]) for i in range(C)]) if C else targets[:0]
        for noise, share in points(targets, drafts, drawn, n):
            drawn_C = torch.tensor(drawn, dtype=torch.int64)
            rows.append((targets, drawn_C, drafts, torch.tensor(n), noise))
            shares.append(weight * share)
    targets, tokens, drafts, drafted, noise = (torch.stack(column) for column in zip(*rows, strict=True))
    got = accept(targets, tokens, drafts, drafted, noise)
    result = defaultdict(float)
    for drawn, n, token, share in zip(
        tokens.tolist(), got.n_accepted_B.tolist(), got.next_token_B.tolist(), shares, strict=True
    ):
        result[*drawn[:n], token] += share
    return result


def written(target, draft, n_tokens, length, choose, keep=lambda drawn: len(drawn)):
    """The distribution of texts of `length` tokens, loop after loop, with `choose(text)` as K of the loop behind it."""
    done, open_texts = defaultdict(float), {(): 1.0}
    while open_texts:
        following = defaultdict(float)
        for text, probability in open_texts.items():
            k = min(choose(text), length - len(text) - 1)
            ahead = first_loop(
                lambda prefix, text=text: target((*text, *prefix)),
                lambda prefix, text=text: draft((*text, *prefix)),
                n_tokens,
                k,
                keep,
            )
            for more, share in ahead.items():
                goal = done if len(text) + len(more) == length else following
                goal[*text, *more] += probability * share
        open_texts = following
    return done


@pytest.mark.parametrize("seed", range(3))
def test_k_from_the_text_so_far_leaves_the_distribution_exact(seed):
    """Enumerated over loops: K of each by a rule that depends on everything before it, in the worst ways."""
    target, draft = random_rows(seed, 3), random_rows(seed + 50, 3)
    wanted = joint(target, 3, 4)
    for choose in (
        lambda text: sum(text) % 3,
        lambda text: 2 if text and text[-1] == 0 else 0,
        lambda text: 3 - min(3, len(text)),
    ):
        assert distance(written(target, draft, 3, 4, choose), wanted) < 1e-12
    # Positive control: what was drawn last in this loop decides whether it is verified. It must not.
    peeking = written(target, draft, 3, 4, lambda _: 2, lambda drawn: len(drawn) - bool(drawn and drawn[-1] == 0))
    assert distance(peeking, wanted) > 1e-3


def probs_of(model, prompt, length, **settings):
    """The exact distribution of the next `length` tokens."""
    sampler = Sampler([SamplingParams(**settings)], torch.device("cpu"))
    texts = {(): 1.0}
    with torch.inference_mode():
        for _ in range(length):
            ids = torch.tensor([[*prompt, *text] for text in texts])
            following = torch.cat([sampler.probs(row[None, -1].double()) for row in model(ids)])
            texts = {
                (*text, token): before * float(probability)
                for (text, before), row in zip(texts.items(), following, strict=True)
                for token, probability in enumerate(row)
            }
    return texts


def small():
    return tiny(vocab_size=3, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, rope=None, scale=0.7)


def sample(target, draft, n):
    """Texts of four tokens by `n` rows, and how far they are from the target's distribution."""
    prompt = [1, 2, 1, 2]
    out = modicum.generate(target, [prompt] * n, draft=draft, num_draft_tokens="auto", max_new_tokens=4, seed=11)
    statistic, freedom = chi_square(Counter(map(tuple, out.tokens)), probs_of(target, prompt, 4), n)
    return out, statistic, freedom


@pytest.fixture
def restless(costs, monkeypatch):
    """A lookahead that forgets what earlier batches did, so that K changes with every draft that stays or falls."""

    class Restless(Untimed):
        def begin(self, n_rows, planned):
            super().begin(n_rows, planned)
            self.cold, self.since_plain, self.lost = False, 0, -1e9
            self.acceptances.forget(1000)

    monkeypatch.setattr(auto, "Lookahead", Restless)
    return costs


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_sampled_distribution_is_the_targets(drafter, restless):
    """Through the public call, K chosen from what the rows themselves have accepted: chi-square of four tokens."""
    restless(linear(0.05, 0.15) if drafter == "model" else linear(0.02, 0.0))
    target = small()
    out, statistic, freedom = sample(target, perturbed(target, 9, 0.3) if drafter == "model" else "ngram", 12_000)
    assert len([k for k, loops in out.stats.loops_by_k.items() if k and loops > 500]) >= 2, out.stats.loops_by_k
    assert freedom > 20
    assert statistic < limit(freedom)


def test_a_chooser_that_looks_at_the_draw_is_caught(restless, monkeypatch):
    """Positive control: drawing, looking and dropping."""
    whole = ModelDrafter.propose

    def peeking(self, batch, allowed, noise_BNP):
        draft = whole(self, batch, allowed, noise_BNP)
        width = draft.tokens_BC.shape[1]
        liked = (draft.tokens_BC[:, -1] >= 1).tolist() if width else []
        counts = [n if like else min(n, width - 1) for n, like in zip(draft.counts, liked, strict=False)]
        return type(draft)(draft.tokens_BC, draft.probs_BCV, counts or draft.counts, draft.calls)

    restless(linear(0.05, 0.15))
    monkeypatch.setattr(ModelDrafter, "propose", peeking)
    target = small()
    _, statistic, freedom = sample(target, perturbed(target, 9, 0.1), 12_000)
    assert statistic > limit(freedom)


@pytest.mark.parametrize("name", ["self", "heads"])
def test_a_drafter_with_a_price_that_shares_with_the_target(name, monkeypatch):
    """Reading has a price, but it must be there from the first loop on to see what the target makes of it."""
    target, given = tiny(), prompts([5, 9])
    source = drafter(name, target)
    source.draft_seconds = lambda clock, rows, n_tokens: n_tokens * 1e-4
    source.read_seconds = lambda clock, rows, n_tokens: 1e-4
    expected = modicum.generate(target, given, temperature=0, max_new_tokens=20).tokens
    script(monkeypatch, 0, 3, 0, 2)
    out = modicum.generate(target, given, draft=source, num_draft_tokens="auto", temperature=0, max_new_tokens=20)
    assert_greedy_equal(target, given, expected, out.tokens)
