"""T5: logits equal those of `transformers` on tiny random checkpoints of every generation."""

import copy

import pytest
import torch
import transformers

import modicum
from modicum.checkpoint.io import read_checkpoint
from tests.parity.t5 import CASES, VOCAB, as_on_the_hub, make


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    theirs = make(request.param, tmp_path / "model")
    if request.param == "v1.1":
        as_on_the_hub(tmp_path / "model")
    return theirs, modicum.load(tmp_path / "model"), tmp_path


def tokens(*shape, seed=7):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


SOURCE, TEXT = tokens(3, 23), tokens(3, 17, seed=8)
LENGTHS = [23, 5, 14]


def logits(model, source, text, lengths=None):
    mask = None if lengths is None else torch.arange(source.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=text).logits


def exact_and_error(theirs, lengths=None):
    """The reference's float64 logits, and how far its own float32 is from float64 at most, over 19 texts."""
    double = copy.deepcopy(theirs).double()
    source, text = tokens(19, 23), tokens(19, 17, seed=9)
    error = (logits(theirs, source, text) - logits(double, source, text)).abs().max()
    return logits(double, SOURCE, TEXT, lengths), error


def test_full_sequence(pair):
    theirs, ours, _ = pair
    exact, error = exact_and_error(theirs)
    with torch.no_grad():
        assert (ours(SOURCE, TEXT) - exact).abs().max() <= 2 * error
        # The comparison can fail: other weights, of every part, are another function.
        for part in (ours.encoder.relative, ours.decoder.relative, ours.decoder.blocks[1].cross.project.k):
            before = part.weight.clone()
            part.weight[1] += 0.1
            assert (ours(SOURCE, TEXT) - exact).abs().max() > 2 * error
            part.weight.copy_(before)


def test_padded_texts(pair):
    theirs, ours, _ = pair
    exact, error = exact_and_error(theirs, LENGTHS)
    with torch.no_grad():
        assert (ours(SOURCE, TEXT, lengths_B=torch.tensor(LENGTHS)) - exact).abs().max() <= 2 * error
        assert (ours(SOURCE, TEXT) - exact).abs().max() > 2 * error


def test_step_by_step_and_ragged(pair):
    theirs, ours, _ = pair
    exact, error = exact_and_error(theirs, LENGTHS)
    cache = ours.new_cache(3, 31)
    with torch.no_grad():
        ours.read([row[:n].tolist() for row, n in zip(SOURCE, LENGTHS, strict=True)], cache)
        first = ours(TEXT[:, :7], cache=cache)
        cache.commit(7)
        step = ours(TEXT[:, 7:8], cache=cache)
        cache.commit(1)
        assert (torch.cat([first, step], 1) - exact[:, :8]).abs().max() <= 2 * error
        # Four more are scored, and each row keeps another number of them.
        assert (ours(TEXT[:, 8:12], cache=cache) - exact[:, 8:12]).abs().max() <= 2 * error
        kept = [4, 0, 2]
        cache.commit(torch.tensor(kept), known=[8 + n for n in kept])
        following = torch.stack([TEXT[row, 8 + n : 8 + n + 3] for row, n in enumerate(kept)])
        expected = torch.stack([exact[row, 8 + n : 8 + n + 3] for row, n in enumerate(kept)])
        assert (ours(following, cache=cache) - expected).abs().max() <= 2 * error
        # The longest text leaves, and what is left moves together.
        cache.keep([2, 1], known=[10, 8])
        assert (ours(following[[2, 1]], cache=cache) - expected[[2, 1]]).abs().max() <= 2 * error
        assert cache.context.k_NBGMK.shape == (ours.config.n_layers, 2, 4, 14, 14)


@pytest.mark.parametrize("packed", [False, True])
def test_groups_equal_their_expansion(packed, tmp_path):
    """`transformers` with every group's keys and values repeated, and here with each of them once."""
    theirs = make("v1.1", tmp_path / "expanded")
    with torch.no_grad():
        for name, parameter in theirs.decoder.named_parameters():
            if name.endswith((".k.weight", ".v.weight")):
                parameter.copy_(parameter.unflatten(0, (2, 2, 14))[:, :1].expand(2, 2, 14, 40).flatten(0, 2))
    theirs.save_pretrained(tmp_path / "expanded")
    grouped = modicum.convert_to_gqa(read_checkpoint(tmp_path / "expanded"), 2, "first")
    modicum.write_checkpoint(grouped, tmp_path / "grouped")
    ours = modicum.load(tmp_path / "grouped")
    assert ours.decoder.blocks[1].cross.project.k.weight.shape == (28, 40)
    if packed:
        ours.for_inference()
    exact, error = exact_and_error(theirs, LENGTHS)
    cache = ours.new_cache(3, 17)
    with torch.no_grad():
        assert (ours(SOURCE, TEXT, lengths_B=torch.tensor(LENGTHS)) - exact).abs().max() <= 2 * error
        ours.read([row[:n].tolist() for row, n in zip(SOURCE, LENGTHS, strict=True)], cache)
        assert (ours(TEXT, cache=cache) - exact).abs().max() <= 2 * error


def test_packed(pair):
    theirs, ours, _ = pair
    exact, error = exact_and_error(theirs)
    with torch.no_grad():
        assert (ours.for_inference()(SOURCE, TEXT) - exact).abs().max() <= 2 * error


@pytest.mark.parametrize("packed", [False, True])
def test_written_back(pair, packed):
    theirs, ours, folder = pair
    if packed:
        ours.for_inference()
    modicum.save(ours, folder / "again")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "again").eval()
    assert type(again) is type(theirs)
    assert torch.equal(logits(again, SOURCE, TEXT), logits(theirs, SOURCE, TEXT))
    before, after = read_checkpoint(folder / "model"), read_checkpoint(folder / "again")
    assert {**before.config, "dtype": "float32", "torch_dtype": "float32"} == {
        **after.config,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
