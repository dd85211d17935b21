"""The report before conversion: nothing is lost where heads share in disguise already, and something where they do not."""

import pytest
import torch

import modicum
from modicum.gqa.report import calibrated_report, weights_report
from modicum.report.conversion import conversion_heat_map
from tests.gqa.planted import FAMILIES, TEXT, disguised, inputs


@pytest.mark.parametrize("family", TEXT)
def test_measured_on_text(family):
    model = FAMILIES[family]()
    held = model.config.n_kv_heads
    wide = disguised(model.double(), model.config.n_heads)
    before = [p.clone() for p in wide.parameters()]
    layers = []
    rows = calibrated_report(wide, [inputs(wide.config)], lambda: layers.append(1))
    assert {row["kv_heads"] for row in rows} == {1, 2, 3}
    assert len(rows) == 3 * len(layers)
    for row in rows:
        values = [row[name] for name in ("keys", "values", "outputs")]
        if row["kv_heads"] == held:
            # The ridge on eighteen tokens' moments is all that is left.
            assert max(values) < 1e-5
        if row["kv_heads"] == 1:
            assert min(values) > 1e-4
    assert all(torch.equal(p, q) for p, q in zip(wide.parameters(), before, strict=True))


# Those whose tiny sizes a stock layout can hold.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(("llama", "t5", "captioner", "vivit"))])
def test_by_the_weights_alone(family, tmp_path):
    model = FAMILIES[family]()
    held, n_heads = model.config.n_kv_heads, model.config.n_heads
    wide = disguised(model.double(), n_heads)
    modicum.save(wide, tmp_path / "wide")
    rows = weights_report(modicum.read_checkpoint(tmp_path / "wide"))
    counts = {row["kv_heads"] for row in rows}
    # Halves of a Model 4 cannot share one head.
    assert counts == ({2, 4, 6} if family == "vivit-4" else {n for n in range(1, n_heads) if n_heads % n == 0})
    for row in rows:
        assert row["outputs"] is None
        if row["kv_heads"] == held:
            assert max(row["keys"], row["values"]) < 1e-9
        if row["kv_heads"] < held:
            assert min(row["keys"], row["values"]) > 1e-3


def test_heat_map(tmp_path):
    rows = [
        {"layer": f"blocks.{i}.attention", "kv_heads": n, "keys": 0.1 * n, "values": 0.2, "outputs": None}
        for i in range(3)
        for n in (1, 2)
    ]
    conversion_heat_map(rows, tmp_path / "a.png", "a model")
    conversion_heat_map([row | {"outputs": 0.9} for row in rows], tmp_path / "b.png", "a model")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size
