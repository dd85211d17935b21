"""The captioner as a module: begins as its parts, reads grouped keys once, learns, and counts what it caches."""

from dataclasses import replace

import pytest
import torch

import modicum
from modicum.captioning.assemble import draft_of, from_parts
from modicum.captioning.model import Captioner
from modicum.config import CaptionerConfig, VivitConfig, with_kv_heads
from modicum.core.positions import sinusoids
from modicum.errors import UsageError
from tests.helpers import WATCHING, clips, decoder_config, tiny, tiny_captioner, tiny_t5
from tests.parity import families
from tests.speculative.readers import CAPTIONERS, name_of
from tests.vivit.tiny import MODELS, clip, tiny_vivit
from tests.vivit.tiny import name_of as variant_of

IDS = torch.tensor([[0, 3, 17, 5, 9, 2, 20], [0, 1, 1, 28, 7, 23, 11], [0, 8, 8, 4, 13, 25, 6]])
VIDEO = torch.stack(clips([9, 9, 9]))


@pytest.mark.parametrize("kind", CAPTIONERS, ids=name_of)
def test_a_cache_changes_nothing(kind):
    """Ragged in what was read and in what was written."""
    model, given = kind.make(), kind.sources([4, 1, 3])
    lengths = [5, 2, 4]
    with torch.no_grad():
        memories = [model.encode(video[None])[0] for video in given]
        wanted = [model(memory[None], ids[None])[0] for memory, ids in zip(memories, IDS, strict=True)]
        cache = model.new_cache(3, 9)
        model.read(memories, cache)
        first = model(IDS[:, :5], cache=cache)
        cache.commit(torch.tensor(lengths), known=lengths)
        following = torch.stack([ids[n : n + 2] for ids, n in zip(IDS, lengths, strict=True)])
        then = model(following, cache=cache)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(first[row, :n], wanted[row][:n], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(then[row], wanted[row][n : n + 2], atol=1e-5, rtol=1e-5)
    # What another row read is noticed.
    with torch.no_grad():
        other = model(memories[0][None], IDS[1:2])[0]
    assert (other - wanted[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CAPTIONERS, ids=name_of)
def test_padding_is_not_seen(kind):
    model, given = kind.make(), kind.sources([4, 1, 3])
    with torch.no_grad():
        memories = [model.encode(video[None])[0] for video in given]
        lengths = [len(memory) for memory in memories]
        padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True, padding_value=7.0)
        together = model(padded, IDS, lengths_B=torch.tensor(lengths))
        for row, memory in enumerate(memories):
            alone = model(memory[None], IDS[row : row + 1, :4])[0]
            torch.testing.assert_close(together[row, :4], alone, atol=1e-5, rtol=1e-5)
        assert (model(padded, IDS) - together).abs().max() > 1e-3


def expanded(model):
    """The same function with a key-value head per query head, each group's copied."""
    wide = Captioner(with_kv_heads(model.config, model.config.n_heads)).eval()
    state, repeats, width = model.state_dict(), model.config.n_heads // model.config.n_kv_heads, model.config.head_dim
    for name, tensor in state.items():
        if name.startswith("decoder.") and (".project.k." in name or ".project.v." in name) and ".ffn." not in name:
            heads = tensor.unflatten(0, (-1, width)).repeat_interleave(repeats, 0)
            state[name] = heads.flatten(0, 1)
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize("kind", CAPTIONERS, ids=name_of)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3])
def test_grouped_heads_are_an_expanded_model(kind, n_kv_heads):
    model = kind.make(n_kv_heads=n_kv_heads)
    wide = expanded(model)
    memories = list(model.encode(VIDEO))
    with torch.no_grad():
        torch.testing.assert_close(wide(VIDEO, IDS), model(VIDEO, IDS), atol=2e-5, rtol=1e-5)
        caches = [m.new_cache(3, 7) for m in (model, wide)]
        for m, cache in zip((model, wide), caches, strict=True):
            m.read(memories, cache)
        narrow, full = (m(IDS, cache=cache) for m, cache in zip((model, wide), caches, strict=True))
    torch.testing.assert_close(narrow, full, atol=2e-5, rtol=1e-5)
    # H / G times less is held of what was read, and of what is written.
    small, large = ([c.k_NBGMK.nbytes + c.v_NBGMK.nbytes for c in (cache, cache.context)] for cache in caches)
    assert [n * 6 // n_kv_heads for n in small] == large
    # Heads copied in another order are another function.
    with torch.no_grad():
        wide.blocks[0].cross.project.v.weight.copy_(wide.blocks[0].cross.project.v.weight.roll(10, 0))
        changed = (wide(VIDEO, IDS) - model(VIDEO, IDS)).abs().max()
    assert changed > 1e-3 or n_kv_heads == 1


@pytest.mark.parametrize("case", families.CASES)
def test_begins_as_the_language_model(case, tmp_path):
    families.make(case, tmp_path)
    text = modicum.load(tmp_path)
    model = from_parts(tiny_vivit(**MODELS[1]), text, start_id=2)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(clip(), ids), text(ids))
        # It reads all the same: with an output that is not zero, it would not be the same text.
        model.blocks[0].cross.out.weight.normal_(0, 0.1)
        assert (model(clip(), ids) - text(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODELS, ids=variant_of)
@pytest.mark.parametrize("memory", ["frames", "patches"])
def test_any_vivit_watches(kind, memory):
    vivit = tiny_vivit(**kind)
    model = from_parts(vivit, tiny(), memory, start_id=0)
    with torch.no_grad():
        features = vivit(clip(), features=True)
        made = model.encode(clip())
        expected = features.frames if memory == "frames" else features.patches.flatten(1, 2)
        if memory == "frames" and kind.get("temporal_layers"):
            # By hand: class token first, positions, blocks, norm, and the frames' own rows.
            t, x = vivit.temporal, features.frames
            x = torch.cat([t.class_token.expand(2, 1, -1), x], 1) + t.positions
            for block in t.blocks:
                x = block(x)
            expected = t.norm(x)[:, 1:]
        torch.testing.assert_close(made, expected)
    assert made.shape == (2, model.config.memory_slots, 24)
    assert model.config.memory_slots == (3 if memory == "frames" else 63)
    assert not any(name.startswith("encoder.head") for name, _ in model.named_parameters())
    # Nothing is left to train that the text does not depend on.
    model.train()
    for block in model.blocks:
        torch.nn.init.normal_(block.cross.out.weight, 0, 0.1)
    model(clip(), IDS[:2]).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_learns_what_the_clip_shows():
    """Two clips, two texts that begin alike: only cross-attention can tell them apart, whose output begins at zero."""
    model = from_parts(tiny_vivit(**MODELS[1]), tiny(scale=0.1), start_id=0).train()
    ids, target = torch.tensor([[0, 5], [0, 5]]), torch.tensor([[3, 4], [9, 8]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(clip(), ids).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Without the clips nothing is below log 2.
    assert losses[0] > 1
    assert losses[-1] < 0.1


def test_a_frozen_encoder_stays_as_it_is():
    model = tiny_captioner(encoder={"stochastic_depth": 0.5}).train()
    model.freeze_encoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    memory = model.encode(VIDEO)
    assert not memory.requires_grad
    assert not model.encoder.training
    assert torch.equal(memory, model.encode(VIDEO))  # no branch is dropped
    loss = model(VIDEO, IDS).square().mean()
    assert torch.equal(loss, model(memory, IDS).square().mean())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if not name.startswith("encoder.")} == moved
    model.freeze_encoder(False)
    assert model.encoder.training
    assert model.encode(VIDEO).requires_grad


@pytest.mark.parametrize("temporal_layers", [0, 2])
def test_frames_are_encoded_once_for_many_windows(temporal_layers):
    model = tiny_captioner(encoder={"temporal_layers": temporal_layers})
    (video,) = clips([14])
    with torch.no_grad():
        frames = model.encode_frames(video[None])
        for start in (0, 2, 3):
            window = model.memory_of_frames(frames[:, start : start + 4])
            alone = model.encode(video[None, 2 * start : 2 * start + 9])
            torch.testing.assert_close(window, alone, atol=1e-5, rtol=1e-5)
        # Fewer frames than there are positions are the first ones.
        assert model.encode(video[None, :5]).shape == (1, 2, 14)
    if temporal_layers:
        with pytest.raises(UsageError, match="7 frame vectors are more than the temporal encoder's 4 positions"):
            model.encode(video[None])
    with pytest.raises(UsageError, match="reads patches, of which no frame vector is made"):
        tiny_captioner(memory="patches").memory_of_frames(frames)
    with pytest.raises(UsageError, match="a clip of 1 frames holds no tubelet of 2"):
        model.encode(video[None, :1])


def test_positions_in_time_are_as_large_as_what_they_stand_beside():
    table = sinusoids(torch.arange(3), 5)
    assert table.shape == (3, 5)
    # Wavelengths 2 pi, 2 pi * 100, 2 pi * 10000: sines, then cosines, cut to an odd width.
    hand = torch.tensor([1.0, 0.01, 0.0001]) * 2
    torch.testing.assert_close(table[2], torch.cat([hand.sin(), hand.cos()])[:5])
    model = tiny_captioner(memory="patches")
    with torch.no_grad():
        model.project.norm.weight.fill_(1)
        model.project.norm.bias.zero_()
        read = model.context_of(torch.ones(1, 24, 14))[0]
    # Equal vectors differ by their time alone: six patches of a frame have one.
    assert torch.equal(read[0], read[5])
    assert (read[5] - read[6]).abs().max() > 0.3


# What is cached of a clip: 12 layers of width 768 in half precision.
FIGURES = [("patches", 12, 115.6), ("patches", 3, 28.9), ("patches", 1, 9.6), ("frames", 12, 0.6)]


@pytest.mark.parametrize(("memory", "n_kv_heads", "megabytes"), FIGURES)
def test_what_a_clip_takes_in_the_cache(memory, n_kv_heads, megabytes):
    from modicum.cli.inspect_captioner import gather

    variant = "spacetime" if memory == "patches" else "factorized_encoder"
    sizes = {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "head_dim": 64, "ffn_dim": 3072}
    decoder = decoder_config(**{**sizes, "n_kv_heads": n_kv_heads})
    watching = VivitConfig(variant=variant, **sizes)
    config = CaptionerConfig(encoder=watching, decoder=decoder, memory=memory, decoder_start_id=0)
    facts = gather(config, "float16")
    assert facts["memory_slots"] == (16 * 14 * 14 if memory == "patches" else 16)
    assert round(facts["context_bytes_per_clip"] / 1e6, 1) == megabytes
    # A class token besides, as in the published figure of 3137 tokens, would not show.
    assert round(facts["kv_bytes_per_token"] * (facts["memory_slots"] + 1) / 1e6, 1) == megabytes
    # And what is promised is what is allocated.
    with torch.device("meta"):
        model = Captioner(config).half()
    cache = model.new_cache(1, 1)
    model.read([torch.zeros(config.memory_slots, 768, device="meta")], cache)
    assert cache.context.k_NBGMK.nbytes + cache.context.v_NBGMK.nbytes == facts["context_bytes_per_clip"]


def test_encoders_are_told_apart():
    model = tiny_captioner()
    mark = model.encoder_fingerprint
    assert tiny_captioner(5, n_layers=1).encoder_fingerprint == mark
    assert tiny_captioner().bfloat16().encoder_fingerprint == mark
    assert tiny_captioner(encoder={"stochastic_depth": 0.3}).encoder_fingerprint == mark
    assert tiny_captioner().for_inference().encoder_fingerprint == mark
    other = tiny_captioner()
    with torch.no_grad():
        other.encoder.embed.project.weight[0, 0] += 1
    assert other.encoder_fingerprint != mark
    with pytest.raises(UsageError, match="the draft was trained on another encoder's output than the target's"):
        modicum.caption(model, clips([9]), draft=other)
    with pytest.raises(UsageError, match="the draft reads patches and the target frames"):
        modicum.caption(model, clips([9]), draft=tiny_captioner(memory="patches"))


def test_a_draft_borrows_the_encoder():
    target, text = tiny_captioner(), tiny(4, n_layers=1)
    draft = draft_of(target, text)
    assert draft.encoder is None
    assert not any(name.startswith("encoder") for name in draft.dense_state())
    with torch.no_grad():
        torch.testing.assert_close(draft(VIDEO, IDS), text(IDS))
        assert torch.equal(draft.encode(VIDEO), target.encode(VIDEO))
    alone = tiny_captioner(5).without_encoder()
    assert alone.config.shares_encoder == target.encoder_fingerprint
    with pytest.raises(UsageError, match="saved without its encoder: use it as the draft of the captioner"):
        modicum.caption(alone, clips([9]))
    assert modicum.caption(alone.share(target), clips([9]), max_new_tokens=3).tokens
    with pytest.raises(UsageError, match="another encoder's output"):
        alone.share(tiny_captioner(encoder={"n_layers": 1}))


def test_what_cannot_be_assembled():
    with pytest.raises(UsageError, match="the decoder is EncoderDecoder: give a decoder-only"):
        from_parts(tiny_vivit(**MODELS[0]), tiny_t5())
    with pytest.raises(UsageError, match="names no token that begins or ends a text: give one as `start_id`"):
        from_parts(tiny_vivit(**MODELS[0]), tiny())
    with pytest.raises(UsageError, match="`decoder_start_id` is 29: it must be one of the 29 token ids"):
        from_parts(tiny_vivit(**MODELS[0]), tiny(), start_id=29)
    config = tiny_captioner().config
    with pytest.raises(UsageError, match="which the encoder's 2 temporal layers never see"):
        replace(config, memory="patches", encoder=replace(config.encoder, temporal_layers=2))
    with pytest.raises(UsageError, match="the video is \\[3, 9, 11, 16\\]: give clips"):
        tiny_captioner()(VIDEO[..., 0], IDS)
    with pytest.raises(UsageError, match="packed for inference and cannot be trained"):
        tiny_captioner().for_inference().train()
    assert tiny_captioner().for_inference().eval()


def test_pixel_values_are_the_same_clip():
    model = tiny_captioner()
    with torch.no_grad():
        wanted = model(VIDEO, IDS)
        assert torch.equal(model(pixel_values=VIDEO.movedim(-1, 2), ids_BL=IDS), wanted)
        assert torch.equal(model(IDS, pixel_values=VIDEO.movedim(-1, 2)), wanted)


def test_one_graph_with_cross_attention():
    model = tiny_captioner(n_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        memory = model.encode(VIDEO)
        torch.testing.assert_close(compiled(memory, IDS), model(memory, IDS))


def test_the_sizes_of_the_tests_differ():
    # A swapped axis would show.
    assert len({WATCHING["dim"], 24, 10, 6, 2, 29, 31, 4}) == 8
