"""Leaving layers out: the kept ones, renumbered, in every family's layout, and as a draft of the whole."""

import sys

import pytest
import torch

import modicum
from modicum import resources
from modicum.checkpoint.prune import keep_layers
from modicum.checkpoint.record import RECORD
from modicum.cli import main
from modicum.errors import UsageError
from tests.helpers import prompts
from tests.parity.families import CASES, make
from tests.parity.t5 import make as make_t5


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_computes_what_it_did(case, tmp_path):
    make(case, tmp_path / "whole")
    whole = modicum.load(tmp_path / "whole")
    modicum.write_checkpoint(keep_layers(modicum.read_checkpoint(tmp_path / "whole"), [0, 2]), tmp_path / "part")
    part = modicum.load(tmp_path / "part")
    assert part.config.n_layers == 2
    ids = torch.tensor(prompts([11], vocab_size=61))
    # The same blocks one after another in the whole model, its second one passed by.
    with torch.no_grad():
        kept = [whole.blocks[0], whole.blocks[2]]
        windows = (whole.windows[0], whole.windows[2])
        whole.blocks, whole.windows = torch.nn.ModuleList(kept), windows
        assert torch.allclose(part(ids), whole(ids), atol=1e-5)
        assert part.windows == windows


def test_the_decoder_of_an_encoder_decoder(tmp_path):
    make_t5("v1.1", tmp_path / "whole")
    whole = modicum.load(tmp_path / "whole")
    last = whole.config.n_layers - 1
    modicum.write_checkpoint(keep_layers(modicum.read_checkpoint(tmp_path / "whole"), [last]), tmp_path / "part")
    part = modicum.load(tmp_path / "part")
    assert (part.config.n_layers, part.config.n_encoder_layers) == (1, whole.config.n_encoder_layers)
    theirs, ours = whole.decoder.blocks[last].state_dict(), part.decoder.blocks[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def convert(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_a_pruned_and_grouped_draft_in_one_command(tmp_path, monkeypatch, capsys):
    goal = tmp_path / "draft"
    options = ("modicum-code-target", goal, "--keep-layers", "0,1,7", "--kv-heads", 2)
    code, out, err = convert(monkeypatch, capsys, *options)
    assert (code, err) == (0, "")
    assert (
        out
        == f"{goal}: 8 -> 3 layers, 8 -> 2 key-value heads by mean, keys and values 4,096 -> 384 numbers per token\n"
    )
    target, draft = modicum.load("modicum-code-target"), modicum.load(goal)
    assert (draft.config.n_layers, draft.config.n_kv_heads) == (3, 2)
    assert draft.files is not None
    assert b'"kept_layers": [' in draft.files[RECORD]
    assert b"val_loss" not in draft.files[RECORD]
    out = modicum.generate(target, "def f(x):", draft=draft, max_new_tokens=5, temperature=0)
    assert len(out.tokens[0]) == 5
    code, out, _ = convert(monkeypatch, capsys, "modicum-code-target", tmp_path / "short", "--keep-layers", "0")
    assert (code, out) == (
        0,
        f"{tmp_path / 'short'}: 8 -> 1 layers, keys and values 4,096 -> 512 numbers per token\n",
    )


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("0,x", "--keep-layers 0,x is not a list of layers"),
        ("0,8", "layers 0, 8 cannot be kept: name some of 0 to 7"),
        ("2,1", "layers 2, 1 cannot be kept"),
        ("1,1", "layers 1, 1 cannot be kept"),
    ],
)
def test_refusals(layers, sentence, tmp_path, monkeypatch, capsys):
    code, out, err = convert(monkeypatch, capsys, "modicum-code-target", tmp_path / "new", "--keep-layers", layers)
    assert (code, out) == (2, "")
    assert sentence in err
    assert not (tmp_path / "new").exists()


def test_no_layers_are_refused():
    with pytest.raises(UsageError, match="layers none cannot be kept"):
        keep_layers(modicum.read_checkpoint(resources.model_presets()["modicum-code-draft"]), [])
