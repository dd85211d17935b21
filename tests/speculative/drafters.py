"""Drafters that were never trained, and what each of them ought to say, computed from the whole text without any cache."""

import itertools
from collections import defaultdict

import torch

from modicum.decode.batch import Batch, Request
from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler
from modicum.speculative.drafters.early_exit import EarlyExitDrafter
from modicum.speculative.drafters.folder import KINDS, new_network
from modicum.speculative.loop import SpeculativeEngine
from tests.speculative.enumeration import Toy, chance, distance, joint, points

NAMES = ("self", *KINDS)


def drafter(name, target, num_draft_tokens=4, noise=0.1, seed=5):
    """The drafter of that name for `target`: `self` exits after one layer."""
    if name == "self":
        return EarlyExitDrafter(1)
    network = new_network(target, name, num_draft_tokens, n_layers=2 if name == "parallel" else 1).to(
        target.embed.weight
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return KINDS[name][1](network.eval())


@torch.no_grad()
def logits_of(name, source, target, text, drawn):
    """What a drafter's next logits are when a row's text is `text` and it has drafted `drawn`: [V]."""
    ids = torch.tensor([text])
    if name == "self":
        return target.score(target.hidden(torch.tensor([[*text, *drawn]]), n_layers=source.n_layers))[0, -1]
    network, place = source.network, len(drawn)
    if name == "parallel":
        x = torch.cat([target.embed(ids), network.slots_CD[None, :place]], 1)
        return target.score(network(target, x, torch.arange(len(text) + place)[None]))[0, -1]
    hidden = target.hidden(ids[:, :-1])
    if name == "heads":
        return target.score(network(hidden[:, -1])[place])[0]
    for i in range(place + 1):
        made = network(target, hidden, torch.tensor([[*text, *drawn[:i]]])[:, 1:])
        hidden = torch.cat([hidden, made[:, -1:]], 1)
    return target.score(made)[0, -1]


def toy(logits, text, sampler):
    """Next-token probabilities by prefix behind a text, penalties for what text and prefix hold included."""

    def probs(prefix):
        scores = logits(prefix)[None]
        seen = torch.zeros(scores.shape, dtype=torch.bool)
        seen[0, [*text, *prefix]] = True
        return sampler.probs(scores, seen)[0]

    return Toy(probs)


def in_cell(probs, token):
    """A uniform that draws `token`."""
    end = float(probs.cumsum(0)[token])
    return (end - float(probs[token]) / 2) / float(probs.sum())


class About:
    """A captioner that has seen its clip, as the decoder-only model that it then is."""

    def __init__(self, target, memory):
        self.target, self.memory = target, memory

    def __call__(self, ids):
        return self.target(self.memory[None], ids)

    def hidden(self, ids, n_layers=None):
        return self.target.hidden(self.memory[None], ids, n_layers=n_layers)

    def __getattr__(self, name):
        return getattr(self.target.decoder, name)


def deviation(name, target, source, text, params, C, memory=None):
    """How far the text distribution of one loop is from the target's, every piece of the loop's outcome going through the
    engine as a row of one batch; and the number of rows. `memory` is what a captioner has seen."""
    V, sampler = target.config.vocab_size, Sampler([params], torch.device("cpu"))
    whole = target if memory is None else About(target, memory)
    with torch.no_grad():
        wanted = toy(lambda prefix: whole(torch.tensor([[*text, *prefix]]))[0, -1], text, sampler)
        offered = toy(lambda prefix: logits_of(name, source, whole, text, prefix), text, sampler)
        noise, shares = [], []
        for drawn in itertools.product(range(V), repeat=C):
            weight = chance(offered, (), drawn)
            targets = torch.stack([wanted(drawn[:i]) for i in range(C + 1)])
            drafts = torch.stack([offered(drawn[:i]) for i in range(C)])
            for uniforms, share in points(targets, drafts, drawn, C) if weight else ():
                for i, token in enumerate(drawn):
                    uniforms[i, Purpose.DRAFT] = in_cell(drafts[i], token)
                noise.append(uniforms)
                shares.append(weight * share)
        request = {
            "prompt": text,
            "source": memory,
            "params": params,
            "eos_ids": frozenset(),
            "max_total": len(text) + C + 1,
        }
        batch = Batch(
            [Request(index=i, key=i, **request) for i in range(len(noise))], vocab_size=V, device=torch.device("cpu")
        )
        batch.noise = lambda n_offsets: torch.stack(noise)
        engine = SpeculativeEngine(target, source, C)
        engine.start(batch)
        loop = engine.step(batch)
        found = defaultdict(float)
        for tokens, share in zip(loop.tokens, shares, strict=True):
            for ending in itertools.product(range(V), repeat=C + 1 - len(tokens)):
                found[(*tokens, *ending)] += share * chance(wanted, tuple(tokens), ending)
        return distance(found, joint(wanted, V, C + 1)), len(noise)
