"""`modicum inspect` of a ViViT by name or folder, and what a window says about a text model's cache."""

import json
import sys

import pytest
import torch

import modicum
from modicum.cli import main
from modicum.vivit.build import build
from tests.helpers import tiny
from tests.vivit.tiny import tiny_vivit

FE_L = ["vivit-l/16x2", "--variant", "factorized_encoder", "--temporal-layers", "24"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout and stderr of `modicum inspect` in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["modicum", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main.run()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture
def facts(run):
    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.mark.parametrize(
    ("arguments", "params", "gflops", "gflops_per_video"),
    [
        # Table 2, table 6 (TFLOPs of all views) and figure 9.
        (["vivit-b/16x2", "--variant", "spacetime"], 88_954_000, 455.2, 12 * 455.2),
        (["vivit-b/16x2", "--variant", "factorized_encoder"], 115_062_928, 284.4, 12 * 284.4),
        (["vivit-b/16x2", "--variant", "factorized_encoder", "--temporal-layers", 0], 86_696_080, 283.9, 12 * 283.9),
        (["vivit-b/16x2", "--variant", "factorized_self_attention"], 117_319_312, 372.3, 12 * 372.3),
        (["vivit-b/16x2", "--variant", "factorized_dot_product"], 88_952_464, 277.1, 12 * 277.1),
        ([*FE_L, "--frames", 32, "--size", 224, "--classes", 400, "--views", "4x1"], 606_827_920, 995.3, 3981.2),
        ([*FE_L, "--frames", 128, "--views", "1x3"], 606_877_072, 3980.4, 11_940),
        (["vivit-l/16x2", "--variant", "spacetime", "--size", 320, "--views", 1], 310_850_960, 3992, 3992),
        (["vivit-h/14x2", "--variant", "spacetime", "--views", "4x3"], 636_945_040, 3980.8, 47_770),
    ],
)
def test_the_papers_figures(facts, arguments, params, gflops, gflops_per_video):
    found = facts(*arguments)
    assert found["params"] == params
    assert found["gflops"] == pytest.approx(gflops, rel=1e-3)
    assert found["gflops_per_video"] == pytest.approx(gflops_per_video, rel=1e-3)
    assert found["gmacs"] < found["gflops"]
    assert found["gmacs_per_video"] == pytest.approx(found["gmacs"] * found["views"][0] * found["views"][1])
    assert "variants" not in found


def test_every_option_reaches_the_model(facts):
    """The same facts as of the model that `build` makes of the same settings."""
    found = facts(
        *("vivit-s/4x3", "--variant", "factorized_self_attention", "--frames", 14, "--sampled-frames", 10),
        *("--size", "13x22", "--classes", 7, "--pooling", "gmp", "--kv-heads", 2, "--attention-order", "time_space"),
        *("--views", "5x2"),
    )
    model = build(
        "vivit-s/4x3", variant="factorized_self_attention", num_frames=14, sampled_frames=10, image_size=(13, 22),
        num_classes=7, pooling="gmp", n_kv_heads=2, attention_order="time_space",
    )  # fmt: skip
    assert found["config"] == json.loads(json.dumps(model.config.to_dict()))
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert (found["tokens"], found["tokens_time"], found["tokens_space"]) == (45, 3, 15)
    assert (found["views"], found["size"], found["frames"], found["classes"]) == ([5, 2], [13, 22], 14, 7)


def test_without_a_variant_all_four_stand_side_by_side(facts, run):
    found = facts("vivit-b/16x2")
    assert [row["variant"] for row in found["variants"]] == [
        "spacetime",
        "factorized_encoder",
        "factorized_self_attention",
        "factorized_dot_product",
    ]
    assert [round(row["gflops"]) for row in found["variants"]] == [455, 284, 372, 277]
    # The top level is what `build` makes by default.
    assert found == {**found["variants"][1], "variants": found["variants"]}
    _, out, _ = run("vivit-b/16x2")
    assert "tokens           3,136 = 16 in time x 196 in space\n" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("factorized")]
    assert rows[0] == ["factorized_encoder", "115,062,928", "284.4", "283.3", "3,412.7"]
    assert [len(row) for row in rows] == [5, 5, 5]


def test_a_variant_that_cannot_be_built_says_why(facts, run):
    found = facts("vivit-b/16x2", "--kv-heads", 3, "--temporal-layers", 2)
    assert "cannot halve 12 query and 3 key-value heads" in found["variants"][3]["refused"]
    assert found["config"]["temporal_layers"] == 2
    _, out, _ = run("vivit-b/16x2", "--pooling", "token")
    assert "factorized_self_attention: factorized_self_attention has no class token: choose pooling gap" in out


def test_one_variant_as_lines(run):
    _, out, _ = run(*FE_L, "--sampled-frames", 30)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    assert lines == {
        "variant": "factorized_encoder, 24 temporal layers",
        "parameters": "606,826,896",
        "input": "30 of 32 frames of 224x224, 400 classes",
        "tokens": "2,940 = 15 in time x 196 in space",
        "GFLOPs": "933.1 per view, 11,197.2 per video of 4x3 views",
        "GMAC": "930.5 per view, 11,165.5 per video",
    }


def test_measure(facts, run):
    small = ["vivit-s/16x2", "--variant", "factorized_encoder", "--temporal-layers", 1, "--frames", 4, "--size", 32]
    found = facts(*small, "--measure")
    assert found["seconds_per_view"] > 0
    assert found["gmacs_per_second"] == pytest.approx(found["gmacs"] / found["seconds_per_view"])
    assert found["threads"] == torch.get_num_threads()
    assert "seconds_per_view" not in facts(*small)
    assert "GMAC/s, float32" in run(*small, "--measure")[1]


@pytest.mark.parametrize(
    "changes", [{"variant": "spacetime"}, {"variant": "factorized_encoder", "temporal_layers": 3, "n_kv_heads": 2}]
)
def test_a_folder(facts, run, tmp_path, changes):
    model = tiny_vivit(**changes)
    modicum.save(model, tmp_path / "vivit")
    found = facts(tmp_path / "vivit", "--views", "2x3")
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["variant"] == changes["variant"]
    assert (found["tokens_time"], found["tokens_space"]) == (3, 21)
    assert found["gflops_per_video"] == pytest.approx(6 * found["gflops"])
    assert found["dtype"] == "float32"
    assert found["file_bytes"] == (tmp_path / "vivit" / "model.safetensors").stat().st_size
    assert f"parameters       {found['params']:,}\n" in run(tmp_path / "vivit")[1]
    assert facts(tmp_path / "vivit", "--measure")["seconds_per_view"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vivit-x/16x2"], "`vivit-x/16x2` is not a ViViT's name"),
        (["vivit-b/16"], "is not a ViViT's name"),
        (["vivit-b/16x2", "--variant", "factorised_encoder"], "did you mean `factorized_encoder`"),
        (["vivit-b/16x2", "--variant", "spacetime", "--temporal-layers", "4"], "only a factorized_encoder"),
        (["vivit-b/16x2", "--kv-heads", "5"], "5 key-value heads do not divide 12 query heads"),
        (["vivit-b/16x2", "--frames", "1"], "hold no tubelet"),
        (["vivit-b/16x2", "--size", "224x"], "--size 224x is not a size: give a side"),
        (["vivit-b/16x2", "--views", "0x3"], "--views 0x3 is not temporal views x crops"),
        (["modicum-code-target", "--variant", "spacetime"], "modicum-code-target is a checkpoint"),
        (["modicum-code-target", "--views", "4x3"], "modicum-code-target is a text model: leave out --views"),
        (["modicum-code-target", "--measure"], "modicum-code-target is a text model"),
    ],
)
def test_refusals(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_windows_do_not_make_the_cache_cheaper(facts, run, tmp_path):
    """`KVCache` holds the full context in every layer, so that is what is shown, with the windows named beside it."""
    model = tiny(n_layers=3, family="mistral", windows=(13, 13, 13))
    modicum.save(model, tmp_path / "windowed")
    found = facts(tmp_path / "windowed")
    cache = model.new_cache(1, model.config.max_seq_len)
    assert found["groups"][0]["cache_bytes"] == cache.k_NBGMK.nbytes + cache.v_NBGMK.nbytes
    assert found["windows"] == [{"window": 13, "layers": 3}]
    said = "The cache holds the full context in every layer, of which 3 of 3 see only the last 13 tokens."
    assert said in " ".join(run(tmp_path / "windowed")[1].split())
    # A window of the whole context hides nothing.
    modicum.save(tiny(family="mistral", windows=(97, 97)), tmp_path / "wide")
    assert facts(tmp_path / "wide")["windows"] == []
    assert "The cache holds" not in run(tmp_path / "wide")[1]
