"""`modicum.caption`: what it takes, each clip encoded once, every drafter through cross-attention, and its refusals."""

import numpy as np
import pytest
import torch

import modicum
from modicum.captioning import clips as room
from modicum.decode.sampling import SamplingParams
from modicum.errors import UsageError
from modicum.speculative.costs import time_calls
from modicum.speculative.drafters.folder import build_drafter, drafter_checkpoint
from modicum.video.read import VideoError
from tests.helpers import clips, perturbed, tiny, tiny_captioner
from tests.speculative.drafters import NAMES, deviation, drafter
from tests.speculative.readers import FRAMES, PATCHES, name_of
from tests.video.clips import write_video

GREEDY = {"max_new_tokens": 15}
LENGTHS = [9, 4, 13, 9, 2]


@pytest.mark.parametrize("kind", [FRAMES, PATCHES], ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_captions_are_the_same_with_every_trained_drafter(kind, name):
    given = clips(LENGTHS)
    expected = modicum.caption(kind.make(), given, **GREEDY).tokens
    for k, rows in ((2, 5), (5, 2)):
        source = drafter(name, kind.make(), num_draft_tokens=4, noise=0.02)
        out = modicum.caption(kind.make(), given[:rows], draft=source, num_draft_tokens=k, **GREEDY)
        assert out.tokens == expected[:rows]
        assert out.stats.draft_calls or out.stats.accepted


@pytest.mark.parametrize("name", NAMES)
def test_the_distribution_is_the_targets_with_every_trained_drafter(name):
    target = tiny_captioner(vocab_size=3, scale=0.5).double()
    source = drafter(name, target, noise=0.3)
    source.check(target)
    (video,) = clips([7])
    with torch.no_grad():
        memory = target.encode(video[None])[0]
    params = SamplingParams(temperature=0.8, top_p=0.95)
    found, n_rows = deviation(name, target, source, [1, 2, 1], params, 2, memory)
    assert n_rows > 10
    assert found < 1e-12
    # Another clip's distribution is another.
    (video,) = clips([7], seed=8)
    with torch.no_grad():
        other = target.encode(video[None])[0]

    before = target.read
    target.read = lambda sources, cache: before([other] * len(sources), cache)
    assert deviation(name, target, source, [1, 2, 1], params, 2, memory)[0] > 1e-4


def test_a_trained_drafter_knows_its_captioner(tmp_path):
    target = tiny_captioner()
    source = drafter("heads", target)
    stored = drafter_checkpoint(source)
    again = build_drafter(stored, torch.device("cpu"), torch.float32)
    again.check(tiny_captioner())
    with pytest.warns(UserWarning, match="trained for a target with other weights"):
        again.check(tiny_captioner(5))
    # The decoder alone has the right shape, but its states have not seen a clip.
    with pytest.warns(UserWarning, match="trained for a target with other weights"):
        again.check(tiny())


@pytest.mark.parametrize("settings", [{"k_invariant": True}, {"bit_exact": True}, {"verification": "block"}], ids=str)
def test_the_other_ways_to_draft(settings):
    rows = 2 if "bit_exact" in settings else 5  # that one writes row by row
    given, exact = clips(LENGTHS)[:rows], "bit_exact" in settings
    expected = modicum.caption(tiny_captioner(), given, bit_exact=exact, **GREEDY).tokens
    for draft in (perturbed(tiny_captioner(), 5, 0.05), tiny(3), "ngram"):
        greedy = modicum.caption(tiny_captioner(), given, draft=draft, **GREEDY, **settings).tokens
        assert greedy == expected
        if "k_invariant" in settings:
            sampled = {"draft": draft, "temperature": 1.0, "seed": 4, "max_new_tokens": 15, **settings}
            texts = [modicum.caption(tiny_captioner(), given, num_draft_tokens=k, **sampled).tokens for k in (2, 5)]
            assert texts[0] == texts[1]


def test_log_probabilities_are_the_targets():
    target, given = tiny_captioner(), clips(LENGTHS)
    plain = modicum.caption(target, given, logprobs=2, **GREEDY)
    drafted = modicum.caption(target, given, draft=tiny(3), logprobs=2, **GREEDY)
    for row, (video, tokens) in enumerate(zip(given, plain.tokens, strict=True)):
        with torch.no_grad():
            logits = tiny_captioner()(video[None], torch.tensor([[0, *tokens[:-1]]]))[0]
        wanted = logits.double().log_softmax(-1)[torch.arange(15), tokens]
        for out in (plain, drafted):
            found = torch.tensor([entry.logprob for entry in out.logprobs[row]], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_k_is_chosen_for_captioners_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, given = tiny_captioner(), clips(LENGTHS)
    expected = modicum.caption(target, given, **GREEDY).tokens
    for draft in (tiny_captioner(5, n_layers=1), tiny(3), "ngram"):
        out = modicum.caption(target, given, draft=draft, num_draft_tokens="auto", **GREEDY)
        assert out.tokens == expected
        assert sum(out.stats.loops_by_k.values()) > 0
    # Calls are timed with as many slots to read as a clip has.
    read = []

    def watched(sources, cache):
        read.append(sources)
        type(target).read(target, sources, cache)

    monkeypatch.setattr(target, "read", watched)
    time_calls(target, 3, [1, 2])
    assert [memory.shape for memory in read[0]] == [(4, 14)] * 3


def test_a_clip_is_encoded_once_for_both(monkeypatch):
    target, draft, calls = tiny_captioner(), tiny_captioner(5, n_layers=1), []
    encode = type(target).encode
    monkeypatch.setattr(
        type(target), "encode", lambda self, video: calls.append((self, len(video))) or encode(self, video)
    )
    out = modicum.caption(target, clips([9, 9, 5, 9, 9, 9]), draft=draft, **GREEDY)
    # Four clips at a time, one call per length.
    assert [(model is target, n) for model, n in calls] == [(True, 3), (True, 1), (True, 2)]
    assert out.stats.seconds_by_part["encode"] > 0


def test_memories_do_not_pile_up(monkeypatch):
    """As many clips wait as memory allows; what is said of each is the same, and the draws are its own."""
    target, given = tiny_captioner(), clips([9, 4, 9, 13, 9])
    settings = {"temperature": 1.0, "seed": 7, "max_new_tokens": 9}
    together = modicum.caption(target, given, **settings).tokens
    # Of a clip's 4 x 14 numbers of 4 bytes, two fit.
    monkeypatch.setattr(room, "MAX_MEMORY_BYTES", 500)
    waiting, form = [], room.parts

    def counted(*args):
        for part in form(*args):
            waiting.append(len(part))
            yield part

    monkeypatch.setattr("modicum.api.parts", counted)
    assert modicum.caption(target, given, **settings).tokens == together
    assert waiting == [2, 2, 1]


def test_all_forms_of_a_clip_say_the_same(tmp_path):
    target = tiny_captioner()
    video, other = clips([9, 9])
    expected = modicum.caption(target, video, **GREEDY).tokens
    both = [*expected, *modicum.caption(target, [other], **GREEDY).tokens]
    batch = torch.stack([video, other])
    with torch.no_grad():
        memories = target.encode(batch)
    floats = batch.float() * (2 / 255) - 1
    turned = np.ascontiguousarray(batch.numpy()[..., ::-1])[..., ::-1]  # from BGR, with a negative stride
    for given in (batch, batch.numpy(), turned, [video.numpy(), other], [memories[0], other], memories, floats):
        assert modicum.caption(target, given, **GREEDY).tokens == both
    assert modicum.caption(target, pixel_values=batch.movedim(-1, 2), **GREEDY).tokens == both
    assert modicum.caption(target, pixel_values=video.movedim(-1, 1), **GREEDY).tokens == expected


def test_files(tmp_path):
    """A file's middle clip, cropped as for classification, while frames of another size are cropped alike."""
    target = tiny_captioner(encoder={"image_size": (20, 20)})
    hues = np.random.default_rng(0).integers(0, 255, (50, 1, 1, 3), dtype=np.uint8)
    path = write_video(tmp_path / "clip.mp4", 0, pictures=list(np.broadcast_to(hues, (50, 48, 64, 3)).copy()))
    frames = modicum.video.read.read_clip(path, 9, stride=2, start=16)
    expected = modicum.caption(target, frames, **GREEDY)
    out = modicum.caption(target, [path, str(path)], **GREEDY)
    assert out.tokens == expected.tokens * 2
    another = modicum.caption(target, path, stride=1, temperature=1.0, seed=1, **GREEDY).tokens
    assert another != modicum.caption(target, path, stride=3, temperature=1.0, seed=1, **GREEDY).tokens
    with pytest.raises(VideoError, match="does not exist"):
        modicum.caption(target, [path, tmp_path / "none.mp4"])


def test_prompts_begin_a_caption():
    target, given = tiny_captioner(), clips([9, 9])
    plain = modicum.caption(target, given, **GREEDY).tokens
    begun = modicum.caption(target, given, prompt=plain[0][:4], max_new_tokens=11)
    assert begun.tokens[0] == plain[0][4:]
    # With the start token or without; one for all, or one each.
    assert modicum.caption(target, given, prompt=[0, *plain[0][:4]], max_new_tokens=11).tokens == begun.tokens
    each = modicum.caption(target, given, prompt=[plain[0][:4], None], max_new_tokens=11).tokens
    assert each == [begun.tokens[0], plain[1][:11]]
    with pytest.raises(UsageError, match="3 prompts were given for 2 videos"):
        modicum.caption(target, given, prompt=[[1], [2], [3]])
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        modicum.caption(target, given, prompt=[[1], []])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda m: modicum.generate(m, [[1, 2]]),
            "the target is a captioner and writes about a video",
        ),
        (lambda m: modicum.caption(tiny(), clips([9])), "Decoder writes no captions: give a captioner"),
        (lambda m: modicum.caption(m), "give either videos or pixel_values"),
        (
            lambda m: modicum.caption(m, clips([9]), tempratur=1),
            "no setting `tempratur`: did you mean `temperature`",
        ),
        (
            lambda m: modicum.caption(m, torch.zeros(9, 11)),
            "a memory is \\[9, 11\\] and this model's encoder",
        ),
        (lambda m: modicum.caption(m, torch.zeros(9)), "a clip is \\[9\\]: give frames"),
        (lambda m: modicum.caption(m, torch.zeros(0, 24)), "a memory is \\[0, 24\\]"),
        (lambda m: modicum.caption(m, 5), "videos is int: give paths, or clips"),
        (lambda m: modicum.caption(m, [None]), "a clip is NoneType, which is no tensor"),
        (lambda m: modicum.caption(m, pixel_values=torch.zeros(3, 11, 16)), "pixel_values are \\[3, 11, 16\\]"),
        (lambda m: modicum.caption(m, clips([9]), draft=5), "the draft is int: give what `modicum.load` makes"),
        (
            lambda m: modicum.caption(m, torch.zeros(9, 12, 16, 3)),
            "the video is \\[1, 9, 12, 16, 3\\] and this model reads",
        ),
        (lambda m: modicum.caption(m, clips([9]), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: modicum.caption(m, clips([9]), stride=0), "`stride` is 0"),
        (lambda m: modicum.caption(m, clips([9]), stop="x"), "stop strings need text"),
        (lambda m: modicum.caption(m, clips([9]), prompt="a"), "has no tokenizer files"),
        (lambda m: modicum.classify(m, "clip.mp4"), "Captioner is not a video classifier"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(UsageError, match=sentence):
        call(tiny_captioner())


def test_a_vivit_with_a_fixed_number_of_frames():
    target = tiny_captioner(encoder={"variant": "spacetime"})
    assert len(modicum.caption(target, clips([9, 9]), max_new_tokens=3).tokens) == 2
    with pytest.raises(
        UsageError, match="the video is \\[1, 4, 11, 16, 3\\] and this model reads \\[B, 9, 11, 16, 3\\]"
    ):
        modicum.caption(target, clips([9, 4]))


def test_int8_weights_are_the_decoders(monkeypatch):
    model = tiny_captioner()
    try:
        model.for_inference("int8")
    except UsageError as refusal:
        pytest.skip(str(refusal))
    assert model.encoder.embed.project.packed.form != "int8"
    assert model.blocks[0].cross.out.packed.form == "int8"
    assert len(modicum.caption(model, clips([9]), **GREEDY).tokens[0]) == 15
