"""Every model leaves PyTorch: `torch.export`, and ONNX as another runtime computes it."""

import pytest
import torch

from tests.vivit.tiny import M2, MODELS, clip, name_of, tiny_vivit

ODD = {"variant": M2, "temporal_layers": 3, "n_kv_heads": 2, "sampled_frames": 9, "heads": (("noun", 8), ("verb", 5))}


def assert_same(ours, theirs):
    torch.testing.assert_close(list(ours.values()) if isinstance(ours, dict) else [ours], theirs)


@pytest.mark.parametrize("kind", [*MODELS, ODD], ids=name_of)
def test_torch_export_with_any_batch(kind):
    model = tiny_vivit(**kind)
    with torch.no_grad():
        program = torch.export.export(model, (clip(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for batch in (1, 2, 5):
            out = program(clip(batch))
            assert_same(model(clip(batch)), list(out.values()) if isinstance(out, dict) else [out])


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", [MODELS[0], ODD, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS[1:])], ids=name_of
)
def test_onnx_with_any_batch(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = tiny_vivit(**kind), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (clip(2),), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (video,) = session.get_inputs()
    assert video.shape[1:] == [11, 36, 22, 3]
    for size in (2, 5):
        with torch.no_grad():
            expected = model(clip(size))
        assert_same(expected, [torch.from_numpy(out) for out in session.run(None, {video.name: clip(size).numpy()})])
