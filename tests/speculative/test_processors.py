"""Logits processors: asked about every drafted prefix, exact under speculation, the same objects as for `transformers`."""

import itertools
from collections import Counter

import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs

import modicum
from modicum.decode.batch import Batch, Request
from modicum.decode.processors import PrefixProcessors, processors_per_prompt
from modicum.decode.sampling import SamplingParams
from modicum.errors import GenerationError, UsageError
from modicum.speculative.drafters.base import Draft
from modicum.speculative.loop import judge
from tests.helpers import perturbed, prompts, tiny, tiny_t5
from tests.speculative.enumeration import Toy, distance, induced, joint
from tests.speculative.test_generate import chi_square, limit

CPU = torch.device("cpu")


def no_bigram_twice(ids, scores):
    """No two tokens may follow each other a second time."""
    text, scores = ids[0].tolist(), scores.clone()
    for first, second in itertools.pairwise(text):
        if first == text[-1]:
            scores[0, second] = -torch.inf
    return scores


def rhythm(ids, scores):
    """Every third place wants a token divisible by three; the others are pushed around by what came before."""
    n, vocab = ids.shape[1], torch.arange(scores.shape[-1])
    if n % 3 == 0:
        return scores.masked_fill(vocab % 3 != 0, -torch.inf)
    return scores + torch.sin(vocab * (1.0 + ids[0, -1]) + ids[0, -2:].sum()) * 2


def one_after_another(model, prompt, n_tokens, *processors):
    """Greedy text from whole-text calls without a cache: what any way of decoding has to equal."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(n_tokens):
            scores = model(torch.tensor([text]))[:, -1]
            for processor in processors:
                scores = processor(torch.tensor([text]), scores)
            text.append(int(scores.argmax()))
    return text[len(prompt) :]


def drafts(target):
    return {"model": perturbed(target, 5, 0.06), "ngram": "ngram", "itself": target}


@pytest.mark.parametrize("processors", [[no_bigram_twice], [rhythm], [no_bigram_twice, rhythm]])
def test_greedy_identity(processors):
    target = tiny()
    drafters = drafts(target)
    given = [[3, 1, 4, 3, 1, 4, 3], [5], prompts([17])[0]]
    call = {"temperature": 0, "max_new_tokens": 25, "logits_processors": processors}
    expected = [one_after_another(target, prompt, 25, *processors) for prompt in given]
    assert modicum.generate(target, given, **call).tokens == expected
    for k, (name, draft) in itertools.product((1, 3, 4), drafters.items()):
        out = modicum.generate(target, given, draft=draft, num_draft_tokens=k, **call)
        assert out.tokens == expected, (k, name)
    # The draft obeys too, so that the target itself is always accepted.
    assert (name, out.stats.tokens_per_target_call) == ("itself", 5)


def unprefixed(self, scores_BNV, tokens_BM, lengths, drafted_BC, longest):
    """Tampered: asked once about the text so far, whatever was drafted behind it."""
    got = scores_BNV.clone()
    for row, processors in enumerate(self.rows):
        for n in range(scores_BNV.shape[1]):
            for processor in processors:
                got[row, n] = processor(tokens_BM[row, None, : lengths[row]], got[row, None, n])
    return got, [1000] * len(self.rows)


def test_processors_applied_without_the_drafted_prefix_are_noticed(monkeypatch):
    """Positive control of the identity, and of the enumeration below."""
    monkeypatch.setattr(PrefixProcessors, "apply", unprefixed)
    target = tiny()
    call = {"temperature": 0, "max_new_tokens": 25, "logits_processors": rhythm}
    expected = one_after_another(target, [5, 6], 25, rhythm)
    assert modicum.generate(target, [[5, 6]], **call).tokens[0] == expected
    assert modicum.generate(target, [[5, 6]], draft=target, **call).tokens[0] != expected
    assert enumerated() > 1e-3


def forbidding(ids, scores):
    """On three tokens: none twice in a row, and a push that depends on place and past."""
    scores = scores + torch.tensor([[0.0, 1.0, -1.0]]).to(scores).roll(ids.shape[1], -1) * (1 + ids[0, -1])
    return scores.index_fill(1, ids[0, -1:], -torch.inf) if ids.shape[1] > 1 else scores


def raw(seed):
    def make(prefix):
        address = seed * 1000 + sum((token + 1) * 5**i for i, token in enumerate(prefix))
        return torch.randn(3, generator=torch.Generator().manual_seed(address), dtype=torch.float64)

    return Toy(make)


def obeying(logits):
    return Toy(lambda prefix: forbidding(torch.tensor([[0, *prefix]]), logits(prefix)[None]).softmax(-1)[0])


def enumerated(draft_obeys=True):
    """How far what `judge` yields is from the processed target, all outcomes weighed exactly, in float64."""
    logits, V, C = raw(1), 3, 2
    target, draft = obeying(logits), raw(2)
    draft = obeying(draft) if draft_obeys else Toy(lambda prefix, known=draft: known(prefix).softmax(-1))

    def rule(_, tokens, draft_probs, drafted, noise):
        request = {"prompt": [0], "key": 0, "max_total": 9, "eos_ids": frozenset(), "processors": (forbidding,)}
        requests = [Request(index=i, params=SamplingParams(), **request) for i in range(len(tokens))]
        batch = Batch(requests, vocab_size=V, device=CPU)
        scored = torch.stack([torch.stack([logits(tuple(row[:n])) for n in range(C + 1)]) for row in tokens.tolist()])
        return judge(batch, scored, Draft(tokens, draft_probs, drafted.tolist(), 0), noise)

    return distance(induced(target, draft, rule, V, C), joint(target, V, C + 1))


@pytest.mark.parametrize("draft_obeys", [True, False])
def test_the_induced_distribution_is_the_processed_targets(draft_obeys):
    assert enumerated(draft_obeys) < 1e-12


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_sampled_texts_have_the_processed_distribution(drafter):
    """Through the public call: all of the joint distribution of three tokens, chi-square at 5,000 texts."""
    target = tiny(vocab_size=5, scale=0.5)
    draft = perturbed(target, 9, 0.2) if drafter == "model" else drafter
    n, prompt = 5_000, [1, 3, 1, 3]
    call = {"num_draft_tokens": 2, "max_new_tokens": 3, "temperature": 0.8, "seed": 4, "logits_processors": rhythm}
    out = modicum.generate(target, [prompt] * n, draft=draft, **call)
    assert 0.05 < out.stats.acceptance_rate < 0.99
    probs = {}
    with torch.inference_mode():
        for text in itertools.product(range(5), repeat=3):
            ids = torch.tensor([[*prompt, *text]])
            logits_LV = target(ids)[0].double()
            steps = [rhythm(ids[:, :at], logits_LV[None, at - 1]) / 0.8 for at in (4, 5, 6)]
            chances = [float(step.softmax(-1)[0, token]) for step, token in zip(steps, text, strict=True)]
            probs[text] = chances[0] * chances[1] * chances[2]
    counts = Counter(map(tuple, out.tokens))
    assert all(probs[text] > 0 for text in counts)
    statistic, freedom = chi_square(counts, {text: p for text, p in probs.items() if p}, n)
    assert statistic < limit(freedom)


def test_they_see_one_text_without_padding():
    target = tiny()
    drafters = drafts(target)
    given, seen = [[3, 1, 4, 3, 1, 4, 3], [5], prompts([17])[0]], [[], [], []]

    def recorder(row):
        def record(ids, scores):
            assert ids.dtype == torch.int64
            assert (ids.shape[0], scores.shape, scores.dtype) == (1, (1, 29), torch.float32)
            seen[row].append(ids[0].tolist())
            return scores

        return record

    lists = [[recorder(0)], None, [recorder(2)]]
    call = {"max_new_tokens": [9, 30, 14], "temperature": [0, 0.9, 0.9], "seed": 5}
    for draft in (None, *drafters.values()):
        for record in seen:
            record.clear()
        out = modicum.generate(target, given, draft=draft, logits_processors=lists, **call)
        # Functions that change nothing change nothing, beside rows that have none.
        assert out.tokens == modicum.generate(target, given, draft=draft, **call).tokens
        for row in (0, 2):
            whole = given[row] + out.tokens[row]
            prefixes = [whole[:n] for n in range(len(given[row]), len(whole))]
            assert all(prefix in seen[row] for prefix in prefixes)
            assert all(ids[: len(given[row])] == given[row] and len(ids) < len(whole) for ids in seen[row])
        assert seen[1] == []


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_a_grammar_never_leaves_its_states(drafter):
    """Even and odd tokens in turn, up to EOS: asked about any other text, this grammar fails."""
    target = tiny()
    target.eos_ids = frozenset({28})
    # Its n-grams propose texts that the grammar forbids, and ends of text with something behind them.
    prompt = [4, 6, 8, 28, 5, 4, 6, 8, 28, 7, 4, 6]
    asked = []

    def grammar(ids, scores):
        text = ids[0, len(prompt) :].tolist()
        asked.append(text)
        assert 28 not in text
        assert all(token % 2 == i % 2 for i, token in enumerate(text))
        allowed = torch.arange(29) % 2 == len(text) % 2
        allowed[28] = len(text) > 3
        return scores.masked_fill(~allowed, -torch.inf)

    draft = {"ngram": "ngram", "model": perturbed(target, 5, 0.3)}[drafter]
    for temperature in (0, 1.0):
        call = {"temperature": temperature, "seed": 3, "max_new_tokens": 30, "logits_processors": grammar}
        out = modicum.generate(target, [prompt] * 9, draft=draft, **call)
        for tokens in out.tokens:
            grammar(torch.tensor([prompt + tokens[:-1]]), torch.zeros(1, 29))
    assert len(asked) > 100


def test_a_text_that_nothing_may_follow():
    target = tiny()
    poor = perturbed(target, 5, 0.3)
    plain = modicum.generate(target, [[1, 2]], temperature=0, max_new_tokens=12).tokens[0]
    never = next(token for token in range(29) if token not in plain and token > 2)
    met = []

    def dead_end(ids, scores):
        met.append(int(ids[0, -1]))
        return scores.masked_fill(ids[0, -1] == dead, -torch.inf)

    call = {"temperature": 0, "logits_processors": dead_end}
    dead = plain[6]
    first = plain.index(dead) + 1
    for draft in (None, target, poor):
        # It is no mistake to end there, and one to go on.
        assert modicum.generate(target, [[1, 2]], draft=draft, max_new_tokens=first, **call).tokens == [plain[:first]]
        with pytest.raises(GenerationError, match="left no token that can be drawn"):
            modicum.generate(target, [[1, 2]], draft=draft, max_new_tokens=first + 1, **call)
    # Proposed, and rejected before anybody gets there.
    dead, prompt = never, [1, 2, never, 7, 1, 2]
    expected = modicum.generate(target, [prompt], temperature=0, max_new_tokens=8).tokens
    met.clear()
    for temperature in (0, 1e-3):
        out = modicum.generate(
            target, [prompt], draft="ngram", **{**call, "temperature": temperature}, max_new_tokens=8
        )
        assert out.tokens == expected
    assert dead in met


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    ours = tiny()
    modicum.save(ours, folder)
    return ours, drafts(ours), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda eos: [theirs.NoRepeatNGramLogitsProcessor(2)],
        lambda eos: [theirs.MinLengthLogitsProcessor(19, eos), theirs.NoRepeatNGramLogitsProcessor(3)],
        lambda eos: theirs.LogitsProcessorList([theirs.NoBadWordsLogitsProcessor([[eos], [7, 3], [12]])]),
        lambda eos: [theirs.SequenceBiasLogitsProcessor({(4, 9): 3.0, (11,): -4.0, (eos,): 2.0})],
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 0.7])
def test_objects_of_transformers_give_the_text_that_they_give_there(pair, make, penalty):
    ours, drafters, reference = pair
    given = [[3, 1, 4, 3, 1, 4, 3], [5], prompts([17])[0]]
    eos = 13
    ours.eos_ids = frozenset({eos})
    call = {"temperature": 0, "max_new_tokens": 25, "repetition_penalty": penalty}
    expected = []
    for prompt in given:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": eos, "pad_token_id": 0}
        text = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            repetition_penalty=penalty,
            logits_processor=theirs.LogitsProcessorList(make(eos)),
            **settings,
        )
        expected.append(text[0, len(prompt) :].tolist())
    assert expected != modicum.generate(ours, given, **call).tokens
    for draft in (None, *drafters.values()):
        assert modicum.generate(ours, given, draft=draft, logits_processors=make(eos), **call).tokens == expected


def test_of_a_t5_they_see_what_it_writes():
    t5, given = tiny_t5(), prompts([4, 9])
    draft = perturbed(t5, 2, 0.05)
    call = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "logits_processors": rhythm}
    out = modicum.generate(t5, given, **call)
    assert modicum.generate(t5, given, draft=draft, **call).tokens == out.tokens
    start = t5.config.decoder_start_id
    for prompt, tokens in zip(given, out.tokens, strict=True):
        for n in range(12):
            with torch.inference_mode():
                begun = torch.tensor([[start, *tokens[:n]]])
                assert tokens[n] == int(rhythm(begun, t5(torch.tensor([prompt]), begun)[:, -1]).argmax())


def test_a_draft_whose_vocabulary_lacks_what_is_allowed_proposes_nothing():
    target, narrow = tiny(), tiny(2, vocab_size=23)
    high = [lambda ids, scores: scores.masked_fill(torch.arange(29) < 25, -torch.inf)]
    for temperature in (0, 1.0):
        call = {"temperature": temperature, "max_new_tokens": 6, "seed": 2, "logits_processors": [high, None]}
        out = modicum.generate(target, [[1, 2], [3]], draft=narrow, **call)
        assert min(out.tokens[0]) >= 25
        assert out.row_stats[0].acceptance_rate is None
        assert out.row_stats[1].judged_by_position[0] > 0


def test_one_for_all_or_one_list_per_prompt():
    def first(ids, scores):
        return scores

    both = theirs.LogitsProcessorList([first, no_bigram_twice])
    assert processors_per_prompt(None, 2) == [(), ()]
    assert processors_per_prompt(first, 2) == [(first,)] * 2
    assert processors_per_prompt(both, 2) == [(first, no_bigram_twice)] * 2
    assert processors_per_prompt([both, None], 2) == [(first, no_bigram_twice), ()]
    assert processors_per_prompt([[], (first,)], 2) == [(), (first,)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([[rhythm]], "has 1 lists for 2 prompts"),
        ([rhythm, [rhythm]], "mixes functions and lists"),
        (["min_length"], "has 'min_length': give functions"),
        (7, "has 7: give functions"),
        (lambda ids, scores: scores[0], "returned shape .29.: it must return scores, .1, 29."),
        (lambda ids, scores: None, "returned NoneType: it must return scores"),
    ],
)
def test_refusals(given, sentence):
    with pytest.raises(UsageError, match=sentence):
        modicum.generate(tiny(), [[1], [2]], max_new_tokens=2, logits_processors=given)
