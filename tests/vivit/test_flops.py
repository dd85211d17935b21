"""What a ViViT costs: the paper's figures, and PyTorch's own counter on the real modules."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import modicum.vivit
from modicum.cli import main
from modicum.config import VivitConfig
from modicum.vivit.build import named_config
from modicum.vivit.flops import cost
from modicum.vivit.model import Vivit

M1, M2, M3, M4 = "spacetime", "factorized_encoder", "factorized_self_attention", "factorized_dot_product"


@pytest.mark.parametrize(
    ("name", "settings", "gflops"),
    [
        # Table 2, ViViT-B/16x2.
        ("b/16x2", {"variant": M1}, 455.2),
        ("b/16x2", {"variant": M2}, 284.4),
        ("b/16x2", {"variant": M3}, 372.3),
        ("b/16x2", {"variant": M4}, 277.1),
        ("b/16x2", {"variant": M2, "temporal_layers": 0}, 283.9),
        # Table 5, ViViT-L/16x2 at three sizes.
        ("l/16x2", {"variant": M1}, 1446),
        ("l/16x2", {"variant": M1, "image_size": 288}, 2919),
        ("l/16x2", {"variant": M1, "image_size": 320}, 3992),
        # Figure 9 and its text; the paper's Lt = 4 does not give these, 24 does.
        ("l/16x2", {"variant": M2, "temporal_layers": 24}, 995.3),
        ("l/16x2", {"variant": M2, "temporal_layers": 24, "num_frames": 128}, 3980.4),
        # Figures 7 and 8, shorter tubelets giving more tokens.
        ("b/16x8", {"variant": M1}, 82.1),
        ("b/16x4", {"variant": M1}, 183.5),
        ("l/16x8", {"variant": M1}, 273.3),
        ("l/16x4", {"variant": M1}, 602.8),
        ("l/16x2", {"variant": M1}, 1445.8),
        ("b/16x8", {"variant": M2}, 73.9),
        ("b/16x4", {"variant": M2}, 144.1),
        ("b/16x8", {"variant": M3}, 95.7),
        ("b/16x4", {"variant": M3}, 187.8),
        ("b/16x2", {"variant": M3}, 372.4),
        ("b/16x8", {"variant": M4}, 72.0),
        ("b/16x4", {"variant": M4}, 140.3),
    ],
)
def test_gflops_of_the_paper(name, settings, gflops):
    counted = cost(named_config(f"vivit-{name}", **settings))
    assert counted.gflops == pytest.approx(gflops, rel=4e-4)
    # The multiply-adds alone are not the paper's figure: the elementwise half is what makes it exact.
    assert counted.gmacs < gflops * 0.9985


@pytest.mark.parametrize(
    ("name", "settings", "views", "tflops"),
    [
        ("h/14x2", {"variant": M1}, 12, 47.77),
        ("l/16x2", {"variant": M2, "temporal_layers": 24, "num_frames": 128}, 1, 3.98),
        ("l/16x2", {"variant": M2, "temporal_layers": 24, "num_frames": 128}, 3, 11.94),
    ],
)
def test_tflops_of_table_6(name, settings, views, tflops):
    assert cost(named_config(f"vivit-{name}", **settings)).gflops * views / 1e3 == pytest.approx(tflops, rel=1e-3)


@pytest.mark.parametrize(("frames", "gflops"), [(32, 995.3), (128, 3980.4)])
def test_four_temporal_layers_do_not_give_the_papers_figure_for_l(frames, gflops):
    counted = cost(named_config("vivit-l/16x2", temporal_layers=4, num_frames=frames))
    assert counted.gflops != pytest.approx(gflops, rel=4e-3)


@pytest.mark.parametrize(
    ("name", "settings", "parameters"),
    [
        ("b/16x2", {"variant": M1}, 88_954_000),
        ("b/16x2", {"variant": M2}, 115_062_928),
        ("b/16x2", {"variant": M2, "temporal_layers": 0}, 86_696_080),
        ("b/16x2", {"variant": M3}, 117_319_312),
        ("b/16x2", {"variant": M4}, 88_952_464),
        ("l/16x2", {"variant": M2, "temporal_layers": 24}, 606_827_920),
    ],
)
def test_parameters(name, settings, parameters):
    assert cost(named_config(f"vivit-{name}", **settings)).parameters == parameters


def test_tokens():
    counted = cost(named_config("vivit-b/16x2", variant=M1))
    assert counted.tokens == (16, 196)
    # 35 frames of 50x37 in tubelets of 3x16x16: remainders are dropped, class tokens not counted.
    counted = cost(named_config("vivit-s/16x3", num_frames=35, image_size=(50, 37)))
    assert counted.tokens == (11, 6)
    assert cost(named_config("vivit-b/16x2", sampled_frames=8)).tokens == (4, 196)


def counted_by_torch(config: VivitConfig) -> int:
    """Multiply-adds of one clip by PyTorch's counter. On the meta device, because on a CPU it sees no attention."""
    with torch.device("meta"):
        model, video = Vivit(config).eval(), torch.empty(1, config.num_frames, *config.image_size, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video)
    return counter.get_total_flops() // 2


SMALL = {
    "image_size": (35, 22),
    "num_frames": 11,
    "tubelet_size": (3, 5, 7),
    "dim": 24,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 7,
    "ffn_dim": 31,
    "num_classes": 13,
}


@pytest.mark.parametrize("pre_logits", [None, 17])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"variant": M1},
        {"variant": M1, "pooling": "gap"},
        {"variant": M1, "sampled_frames": 6},
        {"variant": M2, "temporal_layers": 3},
        {"variant": M2, "temporal_layers": 3, "temporal_heads": 14, "temporal_ffn_dim": 19},
        {"variant": M2, "temporal_layers": 2, "pooling": "gap"},
        {"variant": M2},
        {"variant": M3, "pooling": "gap"},
        {"variant": M4, "pooling": "gap"},
    ],
)
def test_multiply_adds_are_those_of_the_modules(changes, n_kv_heads, pre_logits):
    config = VivitConfig(**{**SMALL, **changes, "n_kv_heads": n_kv_heads, "pre_logits": pre_logits})
    assert cost(config).macs == counted_by_torch(config)


@pytest.mark.parametrize("variant", [M1, M2, M3, M4])
def test_multiply_adds_are_those_of_the_modules_at_full_size(variant):
    config = named_config("vivit-b/16x2", variant=variant)
    assert cost(config).macs == counted_by_torch(config)


def test_elementwise_work_by_hand():
    """Model 3: two attentions of 7 per width each, 23/4 per feed-forward width, 2 per softmax element."""
    config = VivitConfig(**{**SMALL, "variant": M3, "pooling": "gap"})
    counted = cost(config)
    T, S = 3, 7 * 3
    softmax = 4 * (T * S * S + S * T * T)
    assert counted.flops - counted.macs == 5 * (2 * softmax + T * S * (2 * 7 * 24 + 23 * 31 / 4))


def test_the_rooms_readme_is_what_is_computed(monkeypatch, capsys):
    readme = Path(modicum.vivit.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| [^|]+ \| `(vivit-[^`]+)` \| ([\d,.]+) \| ([\d,.]+) \| ([\d,.]+) \| ([\d,]+) \|$", readme, re.M
    )
    assert len(rows) == 11
    for arguments, paper, *printed in rows:
        monkeypatch.setattr(sys, "argv", ["modicum", "inspect", *arguments.split(), "--json"])
        with pytest.raises(SystemExit, match="0"):
            main.run()
        facts = json.loads(capsys.readouterr().out)
        assert printed == [f"{facts['gflops']:,.1f}", f"{facts['gmacs']:,.1f}", f"{facts['params']:,}"]
        assert facts["gflops"] == pytest.approx(float(paper.replace(",", "")), rel=4e-4)
