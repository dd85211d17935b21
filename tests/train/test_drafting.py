"""Drafters trained by recipe: the loss falls, acceptance rises, runs resume bit for bit, recipes are refused or honoured."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import modicum
from modicum import resources
from modicum.config import RopeConfig
from modicum.errors import UsageError
from modicum.speculative.drafters.folder import KINDS, new_network
from modicum.train.drafting import DraftTask
from modicum.train.loop import Training
from modicum.train.recipe import OptimSection, RunSection
from modicum.train.run import train
from tests.helpers import tiny
from tests.train.test_run import recipe, stop_after  # noqa: F401

RECIPE = """
[drafter]
kind = "{kind}"
target = "{target}"
num_draft_tokens = 3
save_dtype = "float32"

[data]
source = "{source}"
held_out = 0.3
window = 24

[optim]
steps = 6
batch = 3
lr = 1e-2
warmup = 2

[run]
folder = "{folder}"
log_every = 1
save_every = 2
validate_every = 3
"""


@pytest.fixture
def target(recipe):  # noqa: F811
    return train(recipe)


def written(tmp_path, target, kind="heads", folder="drafter"):
    path = tmp_path / f"draft-{kind}.toml"
    path.write_text(RECIPE.format(kind=kind, target=target, source=tmp_path / "text", folder=tmp_path / folder))
    return path


def walk(n_tokens, vocab=13, seed=0):
    """A text in which every token is one of two, by the one before it: there is something to learn several tokens ahead."""
    generator, text = np.random.default_rng(seed), [1 + seed]
    while len(text) < n_tokens:
        text.append((3 * text[-1] + 1 + int(generator.random() < 0.2)) % vocab)
    return np.array(text, dtype=np.uint16)


@pytest.fixture(scope="module")
def learned():
    """A tiny target that has learned the text it is tested on."""
    from modicum.lm.objective import CausalLM
    from modicum.train.task import Task

    model = tiny(vocab_size=13, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, rope=RopeConfig(rotary_dim=8), scale=0.15)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    task = Task(CausalLM(32), walk(20_000), walk(400, seed=1), None, batch=16, seed=0)
    for step in range(80):
        task.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.quality(model, bf16=False)[0] < 0.6
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_raises_acceptance(kind, learned, tmp_path):
    target = type(learned)(learned.config).eval()
    target.load_state_dict(learned.state_dict())
    given = [walk(9, seed=seed).tolist() for seed in range(10)]

    def acceptance(network):
        copy = KINDS[kind][0](network.config)
        copy.load_state_dict(network.state_dict())
        model = type(learned)(learned.config).eval()
        model.load_state_dict(learned.state_dict())
        settings = {"num_draft_tokens": 3, "max_new_tokens": 40, "seed": 1}
        return modicum.generate(model, given, draft=KINDS[kind][1](copy.eval()), **settings).stats

    network = new_network(target, kind, 3)
    untrained = acceptance(network)
    task = DraftTask(target, walk(20_000), walk(2_000, seed=1), window=24, batch=8, seed=0, decay=0.8)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    optim = OptimSection(steps=200, batch=8, lr=1e-2, warmup=5, bf16=False, weight_decay=0.0)
    run = RunSection(folder=str(tmp_path), log_every=1000, validate_every=1000, save_every=1000)
    first = task.quality(network, bf16=False)[0]
    last = Training("drafting", network, task, optim=optim, run=run, settings={}).go(resume=False)[1].loss
    assert last < 0.6 * first
    trained = acceptance(network)
    assert 1 - trained.acceptance_rate < 0.8 * (1 - untrained.acceptance_rate)
    assert trained.tokens_per_target_call > untrained.tokens_per_target_call + 0.3
    # The target is what it was, and what training says of acceptance is what decoding finds.
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    shares = [share for _, share in task.by_place(network, bf16=False)]
    assert abs(shares[0] - trained.acceptance_by_position[0]) < 0.12


def test_the_loss_by_hand():
    """Two places of a network whose logits are known, against KL written out."""
    target = tiny(vocab_size=7)
    network = new_network(target, "heads", 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    task = DraftTask(target, np.arange(40) % 7, np.arange(12) % 7, window=5, batch=2, seed=0, decay=0.5)
    ids = task.windows.at(3)[:, :5]
    hidden = target.hidden(ids)
    wanted = target.score(hidden).softmax(-1)
    expected = 0.0
    for place in (1, 2):
        change = F.linear(
            hidden, *(network.heads.get_submodule(f"{place}").get_parameter(n) for n in ("weight", "bias"))
        )
        drafted = target.score(hidden + F.silu(change)).softmax(-1)
        # The head's word at t is about the token that the target's own at t + place is about.
        nats = [
            (wanted[b, t + place] * (wanted[b, t + place] / drafted[b, t]).log()).sum()
            for b in range(2)
            for t in range(5 - place)
        ]
        expected = expected + (1.0, 0.5)[place - 1] * torch.stack(nats).mean()
    assert math.isclose(task.loss(network, 3).item(), expected.item() / 1.5, rel_tol=1e-4)
    (first, share), _ = task.by_place(network, bf16=False)
    assert first > 0
    assert 0 < share < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_ends_in_a_folder_that_drafts(kind, target, tmp_path):
    folder = train(written(tmp_path, target, kind))
    drafter, model = modicum.load(folder), modicum.load(target, dtype="float32")
    assert (drafter.config.kind, drafter.config.num_draft_tokens) == (kind, 3)
    settings = {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True}
    out = modicum.generate(model, "def function", draft=drafter, **settings)
    assert out.tokens == modicum.generate(model, "def function", **settings).tokens
    record = json.loads((folder / "training.json").read_text())
    assert len(record["accepted_by_place"]) == 3
    assert record["steps"] == 6
    assert (tmp_path / "drafter" / "log.csv").read_text().count("\n") == 1 + 6 + 2


def test_resume_is_bit_exact(target, tmp_path, monkeypatch):
    path = written(tmp_path, target, "features")
    train(path)
    other = [f"run.folder={json.dumps(str(tmp_path / 'other'))}"]
    stop_after(3, monkeypatch)
    assert train(path, other) is None
    monkeypatch.undo()
    train(path, other, resume=True)
    whole, resumed = (load_file(tmp_path / run / "state.safetensors") for run in ("drafter", "other"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(UsageError, match="begun with other settings"):
        train(path, [*other, "drafter.decay=0.5"], resume=True)


def test_text_that_the_target_writes_itself(target, tmp_path):
    path = written(tmp_path, target)
    folder = train(path, ["data.sampled_tokens=700"])
    cache = tmp_path / "drafter" / "data" / "sampled.npy"
    sampled = np.load(cache)
    assert len(sampled) == 30 * 24  # whole windows
    assert modicum.load(folder).config.kind == "heads"
    stamp = cache.stat().st_mtime_ns
    train(path, ["data.sampled_tokens=700"], resume=True)
    assert cache.stat().st_mtime_ns == stamp
    # Each window begins with a piece of the text, and goes on otherwise.
    text = np.load(tmp_path / "drafter" / "data" / "training.npy").astype(int).tolist()
    pieces = {tuple(text[i : i + 6]) for i in range(len(text))}
    assert all(tuple(row[:6].tolist()) in pieces for row in sampled.reshape(30, 24))
    assert not all(tuple(row[6:12].tolist()) in pieces for row in sampled.reshape(30, 24))


def test_dry_runs_say_what_would_be_done(target, tmp_path, capsys):
    assert train(written(tmp_path, target), dry_run=True) is None
    text = capsys.readouterr().err
    assert "heads, 816 parameters, 3 tokens at a time" in text
    assert "6 of 72 tokens" in text
    assert not (tmp_path / "drafter").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_recipes_are_whole(kind, capsys):
    train(resources.recipe_path(f"draft-{kind}"), dry_run=True)
    assert f"drafter     {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("drafter.kind=tails", "`kind` is 'tails': choose one of heads, features, parallel"),
        ("drafter.decay=0.0", "`decay` is 0.0"),
        ("drafter.num_draft_tokens=0", "`num_draft_tokens` is 0"),
        ("drafter.n_layers=2", "one layer: leave it out"),
        ("data.window=4", "`window` is 4: 5 tokens at least"),
        ("data.window=65", "`window` is 65 and the context of"),
        ("drafter.depth=3", "no key `depth`"),
    ],
)
def test_recipes_that_cannot_be_honoured(target, tmp_path, override, sentence):
    with pytest.raises(UsageError, match=sentence):
        train(written(tmp_path, target), [override], dry_run=True)


def test_a_network_is_the_same_for_a_seed():
    for kind in KINDS:
        first, second, other = (new_network(tiny(), kind, 3, seed=seed).state_dict() for seed in (4, 4, 5))
        assert all(torch.equal(first[name], second[name]) for name in first)
        # Only a parallel drafter has anything of its own to begin with; the others begin as the target is.
        assert (kind == "parallel") == any(not torch.equal(first[name], other[name]) for name in first)
