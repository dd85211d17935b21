"""Small captioners with random weights and a tokenizer, which say different things about different clips."""

import torch

from modicum.captioning.assemble import draft_of, from_parts
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.train.tokenizer import tokenizer_files, train_tokenizer
from tests.classification.small import small
from tests.helpers import random_weights, tiny

FILES = tokenizer_files(train_tokenizer(["a red square moves left\n"] * 5, 270), 97)


def writer(seed=0, **settings):
    """A text model whose tokenizer has all bytes and some words."""
    model = tiny(seed, vocab_size=270, **settings)
    model.files, model.tokenizer, model.eos_ids = FILES, Tokenizer.from_files(FILES, {}), frozenset({0})
    return model


def captioner(memory="frames", seed=0, **vivit):
    """A captioner of clips of 6 frames of 48 x 48."""
    if memory == "patches":
        vivit = {"temporal_layers": 0, **vivit}
    return random_weights(from_parts(small(**vivit), writer(seed), memory), 0.3)


def draft_for(target, scale=0.05):
    """One that shares its encoder and often agrees with it."""
    draft = draft_of(target, writer())
    draft.load_state_dict({name: x for name, x in target.dense_state().items() if not name.startswith("encoder.")})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return draft
