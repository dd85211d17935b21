"""modicum certify: a sound pair passes, every kind of broken one is caught, and its statistics are right."""

import json
import sys

import pytest
import torch

import modicum
from modicum import api
from modicum.cli import main
from modicum.core import exact
from modicum.core.attend import folded
from modicum.speculative import loop
from modicum.speculative.accept import accept, accept_greedy
from modicum.speculative.certify import Certifier, Settings, loosened
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter
from modicum.speculative.statistics import binomial_tail, chi_square, chi_square_tail, corrected
from tests.helpers import perturbed, prompts, tiny, tiny_t5
from tests.speculative.drafters import drafter as untrained

SMALL = {"samples": 1000, "contexts": 2, "texts": 6, "num_draft_tokens": 3, "seed": 1}


def certify(target, drafter=None, dtype=torch.float32, given=None, **settings):
    """Verdicts and figures by name."""
    target = target.to(dtype)
    drafter = drafter or ModelDrafter(perturbed(target, 9, 0.1).for_inference())
    given = given or prompts([5, 9, 2, 14, 7])
    checks = Certifier(api.generate, target, drafter, given, Settings(**{**SMALL, **settings})).run()
    return {check.name: check for check in checks}


def verdicts(checks):
    return [check.verdict for check in checks.values()]


@pytest.mark.parametrize(
    ("settings", "drafter"),
    [
        ({}, None),
        ({"verification": "block"}, None),
        ({"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}, None),
        ({"top_k": 5, "min_p": 0.05}, NgramDrafter()),
    ],
)
def test_a_sound_pair_passes(settings, drafter):
    checks = certify(tiny(), drafter, **settings)
    assert list(checks) == ["greedy identity", "distribution", "acceptance", "bit-exact"]
    assert verdicts(checks)[:2] + verdicts(checks)[3:] == ["PASS"] * 3
    # An n-gram may have nothing to propose at these contexts.
    assert checks["acceptance"].passed in ((True,) if drafter is None else (True, None))
    assert checks["bit-exact"].figures["differing_without"] > 0
    # Second tokens are tested behind first ones that are frequent enough.
    assert len(checks["distribution"].figures["p_values"]) >= (3 if "top_k" in settings else 2)
    for context in checks["acceptance"].figures.get("contexts", []):
        assert context["measured"] == pytest.approx(context["theory"], abs=0.08)


def test_in_low_precision_too():
    assert verdicts(certify(tiny(), dtype=torch.bfloat16)) == ["PASS"] * 4


def test_a_text_about_a_text():
    checks = certify(tiny_t5(), given=prompts([5, 9, 2]), samples=600)
    assert verdicts(checks) == ["PASS"] * 4


def squared_coins(target, tokens, draft, drafted, noise):
    noise = noise.clone()
    noise[..., 1] **= 2
    return accept(target, tokens, draft, drafted, noise)


def replaced_from_the_target(target, tokens, draft, drafted, noise):
    got = accept(target, tokens, draft, drafted, noise)
    each = torch.arange(len(tokens))
    edges = target[each, got.n_accepted_B].double().cumsum(-1)
    token = torch.searchsorted(edges, noise[each, got.n_accepted_B, 2:3], right=True)[:, 0]
    return got._replace(next_token_B=torch.where(got.n_accepted_B < drafted, token.clamp(max=28), got.next_token_B))


def everything_stays(target, tokens, draft, drafted, noise):
    got = accept(target, tokens, draft, drafted, noise)
    return got._replace(n_accepted_B=drafted)


@pytest.mark.parametrize(
    ("rule", "failing"),
    [
        (squared_coins, {"distribution", "acceptance"}),
        (replaced_from_the_target, {"distribution"}),
        (everything_stays, {"distribution", "acceptance"}),
    ],
)
def test_a_broken_rule_is_caught(rule, failing, monkeypatch):
    monkeypatch.setattr(loop, "accept", rule)
    draft = ModelDrafter(perturbed(tiny(), 9, 0.2).for_inference())
    checks = certify(tiny(), draft)
    assert {name for name, check in checks.items() if check.passed is False} == failing


def test_drafts_scored_with_what_they_were_not_drawn_from_are_caught(monkeypatch):
    whole = Drawing.draw

    def softer(drawing, logits):
        token = whole(drawing, logits)
        drawing.probs[-1:] = [(probs + 0.02) / 1.58 for probs in drawing.probs[-1:]]
        return token

    monkeypatch.setattr(Drawing, "draw", softer)
    assert certify(tiny())["distribution"].verdict == "FAIL"


def test_wrong_greedy_text_is_caught(monkeypatch):
    def lenient(target_tokens, tokens, drafted):
        got = accept_greedy(target_tokens, tokens, drafted)
        return got._replace(n_accepted_B=torch.maximum(got.n_accepted_B, drafted.clamp(max=1)))

    monkeypatch.setattr(loop, "accept_greedy", lenient)
    checks = certify(tiny(), temperature=0.0)
    assert list(checks) == ["greedy identity", "bit-exact"]
    assert verdicts(checks) == ["FAIL", "FAIL"]
    assert checks["greedy identity"].figures["unexplained"] > 0


def test_other_bits_are_caught(monkeypatch):
    monkeypatch.setattr(exact, "causal_alone", folded)
    checks = certify(tiny(), temperature=0.0)
    assert verdicts(checks) == ["PASS", "FAIL"]


def test_a_dtype_without_bit_exactness_says_so():
    checks = certify(tiny(), dtype=torch.float64, temperature=0.0)
    assert verdicts(checks) == ["PASS", "-"]
    assert "needs weights that oneDNN lays out" in checks["bit-exact"].summary


def test_a_token_that_filters_exclude_is_caught(monkeypatch):
    # The target's filter is off in the loop: what it lets through is impossible, however few the rows.
    whole = loop.judge

    def unfiltered(batch, logits, *rest):
        logits = logits.clone()
        logits[..., 11] = logits.amax(-1)
        return whole(batch, logits, *rest)

    monkeypatch.setattr(loop, "judge", unfiltered)
    check = certify(tiny(), top_k=3)["distribution"]
    assert check.passed is False
    assert check.figures["impossible"] > 0


def test_the_command(monkeypatch, capsys, tmp_path):
    for name, model in (("target", tiny()), ("draft", perturbed(tiny(), 9, 0.2))):
        modicum.save(model, tmp_path / name)
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in prompts([5, 9, 2])))
    arguments = [tmp_path / "target", "--draft", tmp_path / "draft", "--prompts", given, "-k", 2]
    arguments += ["--samples", 700, "--contexts", 1, "--texts", 5]

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["modicum", "certify", *map(str, [*arguments, *more])])
        with pytest.raises(SystemExit) as stopped:
            main.run()
        return stopped.value.code, *capsys.readouterr()

    code, out, _ = call()
    assert code == 0
    assert out.count("PASS") == 5
    code, out, _ = call("--json", "--verification", "block")
    report = json.loads(out)
    assert (code, report["passed"], len(report["checks"])) == (0, True, 4)
    assert report["settings"]["verification"] == "block"
    monkeypatch.setattr(loop, "accept", squared_coins)
    code, out, _ = call()
    assert code == 1
    assert "FAIL" in out
    code, out, err = call("--samples", 0)
    assert (code, out) == (2, "")
    assert "each must be at least 1" in err


def test_chi_square_by_hand():
    # Expected 50, 30, 20 of 100: (10^2 / 50) + (5^2 / 30) + (5^2 / 20).
    statistic, freedom = chi_square(torch.tensor([60, 25, 15]), torch.tensor([0.5, 0.3, 0.2]))
    assert (statistic, freedom) == (pytest.approx(2 + 25 / 30 + 25 / 20), 2)
    # Two rare outcomes form a cell of 6; one alone joins the least of the others.
    probs = torch.tensor([0.60, 0.34, 0.03, 0.03])
    assert chi_square(torch.tensor([60, 30, 7, 3]), probs) == (pytest.approx(16 / 34 + 16 / 6, rel=1e-6), 2)
    assert chi_square(torch.tensor([60, 36, 4]), torch.tensor([0.6, 0.36, 0.04])) == (pytest.approx(0), 1)
    assert chi_square(torch.tensor([99, 1]), torch.tensor([0.99, 0.01])) == (0.0, 0)


def test_tails_by_hand():
    assert chi_square_tail(3.841458820694124, 1) == pytest.approx(0.05)
    assert chi_square_tail(2 * 3.0, 2) == pytest.approx(float(torch.exp(torch.tensor(-3.0, dtype=torch.float64))))
    assert chi_square_tail(5.0, 0) == 1.0
    assert binomial_tail(0, 10, 0.5) == pytest.approx(2 / 1024)
    assert binomial_tail(5, 10, 0.5) == pytest.approx(1.0)
    assert binomial_tail(3, 4, 0.25) == pytest.approx(13 / 256)
    assert (binomial_tail(7, 7, 1.0), binomial_tail(6, 7, 1.0), binomial_tail(0, 7, 0.0)) == (1.0, 0.0, 1.0)
    assert corrected([0.2, 0.01, 0.9]) == pytest.approx(0.03)
    assert (corrected([0.8, 0.9]), corrected([])) == (1.0, 1.0)


def test_loosened_filters_keep_a_little_more():
    params = Settings(top_k=40, top_p=0.9, min_p=0.1).params
    wide = loosened(params)
    assert (wide.top_k, wide.top_p, wide.min_p) == (43, pytest.approx(0.927), pytest.approx(0.09))
    assert loosened(Settings().params) == Settings().params


@pytest.mark.parametrize("name", ["self", "heads", "features"])
def test_drafters_that_share_with_the_target(name):
    target = tiny()
    checks = certify(target, untrained(name, target, num_draft_tokens=3), samples=600)
    assert verdicts(checks) == ["PASS"] * 4
    assert len(checks["acceptance"].figures["contexts"]) == SMALL["contexts"]


def test_more_tokens_than_bit_exact_can_take_leave_the_other_checks():
    checks = certify(tiny(), NgramDrafter(), num_draft_tokens=64, samples=20, texts=2)
    assert checks["bit-exact"].passed is None
    assert "at most 63" in checks["bit-exact"].summary


def test_a_k_chosen_by_times_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modicum", "certify", "modicum-code-target", "--draft", "ngram", "-k", "auto"])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    assert stopped.value.code == 2
    assert "-k auto cannot be certified" in capsys.readouterr().err
