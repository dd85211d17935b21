"""The demo's frame and its steps on tiny models; the whole of it, quick, runs in CI as `make demo-check`."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modicum import api, resources
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.cli import demo, demo_caption, demo_text, demo_video, main
from modicum.cli.demo_gqa import validations
from modicum.cli.demo_story import Story
from modicum.config import VivitConfig
from modicum.errors import GenerationError, MissingExtraError
from modicum.report.html import Report
from modicum.train.tokenizer import tokenizer_files, train_tokenizer
from modicum.video.synthetic import MOTION_LABELS, draw_scene
from modicum.vivit.build import initialise
from modicum.vivit.model import Vivit
from tests.helpers import WATCHING, perturbed, tiny_captioner


@pytest.fixture
def story():
    return Story(Report("A demo", "of tests"), quick=True)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    return stopped.value.code


def test_a_report_replaces_only_a_report(monkeypatch, tmp_path, capsys):
    told = []
    monkeypatch.setattr(demo, "tell", lambda story: told.append(story.quick))
    path = tmp_path / "report.html"
    assert run(monkeypatch, "--out", path) == 0
    path.write_text(path.read_text().replace("A ", "An old "))
    assert run(monkeypatch, "--quick", "--out", path) == 0
    assert told == [False, True]
    assert "An old" not in path.read_text()
    printed = capsys.readouterr().out
    for command, _ in demo.COMMANDS:
        assert command in printed
    path.write_text("not a report")
    assert run(monkeypatch, "--out", path) == 2
    assert "is not a report of modicum: choose another --out" in capsys.readouterr().err
    assert path.read_text() == "not a report"
    assert run(monkeypatch, "--out", tmp_path / "missing" / "report.html") == 2
    assert run(monkeypatch, "--out", tmp_path) == 2
    assert len(told) == 2  # refusals come before any work


def test_a_failed_demo_leaves_the_earlier_report(monkeypatch, tmp_path):
    path = tmp_path / "report.html"
    Report("An earlier one", "").write(path)

    def fail(story):
        raise GenerationError("speculative and plain text differ")

    monkeypatch.setattr(demo, "tell", fail)
    assert run(monkeypatch, "--out", path) == 1
    assert "An earlier one" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_commands_exist():
    """What the demo tells people to try is what the command line takes."""
    import shlex

    import typer

    group = typer.main.get_command(main.app)
    assert len(demo.COMMANDS) == 3
    for command, _ in demo.COMMANDS:
        program, verb, *arguments = shlex.split(command)
        assert program == "modicum"
        group.commands[verb].make_context(verb, arguments)


def test_a_step_without_its_extra_is_left_out(story, capsys):
    with story.step("First"):
        raise MissingExtraError("av", "video", "reading a video")
    with story.step("Second") as step:
        step.headline("3", "things")
    first, second = story.report.sections
    assert "pip install 'modicum[video]'" in first.blocks[0].text
    assert second.headline == ("3", "things")
    assert "pip install 'modicum[video]'" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ZeroDivisionError), story.step("Third"):
        raise ZeroDivisionError


def test_videos_are_made_and_named_by_the_shipped_classifier(story, monkeypatch, tmp_path):
    """With a classifier in place the demo takes it, draws clips of its size, and reports what it says."""
    config = VivitConfig(**{**WATCHING, "image_size": (20, 20), "num_classes": len(MOTION_LABELS)})
    model = Vivit(config)
    initialise(model, seed=0)
    model.labels = MOTION_LABELS
    with torch.no_grad():
        model.head.bias[5] = 9.0  # whatever it sees
    api.save(model.eval(), tmp_path / "classifier")
    monkeypatch.setattr(resources, "model_presets", lambda: {demo_video.CLASSIFIER: tmp_path / "classifier"})
    monkeypatch.setattr(demo_video, "compare", lambda step: None)
    model = demo_video.classifier()
    with demo_video.folder_of_clips(story, model) as clips:
        demo_video.watch(story, model, clips)
        assert {clip.frames.shape for clip in clips} == {(9, 20, 20, 3)}
    made, named = story.report.sections
    assert [len(block.strips) for block in made.blocks if block.kind == "strips"] == [8]
    assert named.headline == ("2 of 16", "motions named right, where chance is 2")
    (table,) = [block for block in named.blocks if block.kind == "table"]
    assert [row[:2] for row in table.rows] == [[label, MOTION_LABELS[5]] for label in MOTION_LABELS]


def test_costs_of_the_four_models():
    """Model 1's attention grows with the square of the clip's length, the others' with the length."""
    ratios = {variant: demo_video.growth(variant)[1] for variant in demo_video.VARIANTS}
    for variant, gflops in ratios.items():
        last = gflops[-1] / gflops[-2]
        assert last > 3 if variant == "spacetime" else 1.95 < last < 2.15, variant


@pytest.fixture(scope="module")
def pair():
    """A captioner that writes in a tokenizer's words, and a draft that mostly agrees with it."""
    files = tokenizer_files(train_tokenizer(["two red circles move left, then a blue square grows"] * 5, 270), 97)
    encoder = {"image_size": (20, 20)}
    target = tiny_captioner(0, vocab_size=270, encoder=encoder)
    draft = perturbed(target, 1, 0.02)
    draft.encoder.load_state_dict(target.encoder.state_dict())  # which a pair shares
    for model in (target, draft):
        model.tokenizer = Tokenizer.from_files(files, {"vocab_size": 270})
        model.eos_ids = frozenset()
    return target, draft


def test_captions_are_shown_with_their_sources(story, pair):
    demo_caption.describe(story, *pair)
    (section,) = story.report.sections
    (strips,) = [block for block in section.blocks if block.kind == "strips"]
    assert len(strips.strips) == 2
    for number, strip in enumerate(strips.strips):
        scene = draw_scene(np.random.default_rng([3, number]), held_out=True)
        (shown, caption), (_, written) = strip.lines
        assert (shown, caption) == ("shown", scene.caption)
        assert {token.source for token in written.tokens} == {"draft", "target"}
        assert len(strip.frames) == 8
    assert section.headline == ("0 of 2", "scenes described exactly, with a draft in the same words")
    assert list(section.sources) == ["draft", "target"]
    story.report.render()


def test_captions_that_differ_are_refused(story, pair, monkeypatch):
    real = api.caption

    def differing(*arguments, draft=None, **settings):
        out = real(*arguments, draft=draft, **settings)
        return out if draft is None else replace(out, tokens=[[0, *tokens] for tokens in out.tokens])

    monkeypatch.setattr(api, "caption", differing)
    with pytest.raises(GenerationError, match="captions differ"):
        demo_caption.describe(story, *pair)


def test_facts_are_counted_by_kind(story):
    """By hand: of two scenes one is right in all, the other in count, shape and motion."""
    from modicum.video.synthetic import Event, Scene

    first = Scene((Event(2, "red", "circle", "grows"), Event(1, "blue", "ring", "blinks")))
    second = Scene((Event(1, "green", "bar", "shrinks"),))
    said = [first.caption, second.caption.replace("green", "white")]
    clip = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    written = [
        demo_caption.Written(SimpleNamespace(name="a.mp4"), clip, scene, text, [])
        for scene, text in zip((first, second), said, strict=True)
    ]
    with story.step("Captions") as step:
        demo_caption.report_facts(step, written)
    (table,) = [block for block in story.report.sections[0].blocks if block.kind == "table"]
    assert table.rows == [
        ["count", "2", "2"],
        ["colour", "1", "2"],
        ["shape", "2", "2"],
        ["motion", "2", "2"],
        ["order", "1", "1"],
    ]
    assert story.report.sections[0].headline[0] == "1 of 2"


def test_acceptance_by_position_over_runs():
    runs = [
        SimpleNamespace(accepted_by_position=[3, 1], judged_by_position=[4, 3]),
        SimpleNamespace(accepted_by_position=[2, 2], judged_by_position=[6, 2]),
    ]
    assert demo_text.positions_of(runs) == [5 / 10, 3 / 5]


def test_validations_of_a_log(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,val_loss\n10,2.5,\n10,,2.25\n20,,2.125\n")
    assert validations(tmp_path / "log.csv") == [(10, 2.25), (20, 2.125)]
