"""What a checkpoint is, without its weights: from a folder, and from a hub that is played by functions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from modicum.checkpoint.hub import Outline, outline
from modicum.errors import CheckpointError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def header(**dtypes: str) -> Any:
    return SimpleNamespace(tensors={name: SimpleNamespace(dtype=dtype) for name, dtype in dtypes.items()})


def refuse(*args: object, **kwargs: object) -> Any:
    raise errors.LocalEntryNotFoundError("nothing in the cache")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one repository of two shards. Tests change what its functions do."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    sizes = {"b.safetensors": 700, "a.safetensors": 50}
    shards = {"b.safetensors": header(up="F32"), "a.safetensors": header(mask="U8", norm="BF16")}

    def fetch(repo_id: str, name: str) -> str:
        assert (repo_id, name) == ("owner/name", "config.json")
        return str(tmp_path / "config.json")

    answers: dict[str, Any] = {
        "hf_hub_download": fetch,
        "get_safetensors_metadata": lambda repo_id: SimpleNamespace(files_metadata=shards),
        "get_paths_info": lambda repo_id, paths: [SimpleNamespace(size=sizes[path]) for path in paths],
        "snapshot_download": refuse,
    }
    for name in answers:
        monkeypatch.setattr(huggingface_hub, name, lambda *args, _name=name, **kwargs: answers[_name](*args, **kwargs))
    return answers


def test_a_hub_gives_its_config_and_headers_alone(hub: dict[str, Any]) -> None:
    """`snapshot_download`, which would fetch the weights, is not called: it would raise."""
    assert outline("owner/name") == Outline(CONFIG, "bfloat16", 750)


def test_a_folder_says_the_same_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("the network must not be used"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = tmp_path / "model.safetensors"
    save_file({"a_mask": torch.ones(3, dtype=torch.uint8), "norm": torch.ones(5, dtype=torch.bfloat16)}, weights)
    assert outline(tmp_path) == outline(str(tmp_path)) == Outline(CONFIG, "bfloat16", weights.stat().st_size)
    save_file({"a_mask": torch.ones(3, dtype=torch.uint8)}, weights)
    with pytest.raises(CheckpointError, match="no floating-point weights"):
        outline(tmp_path)


def test_offline_what_was_downloaded_before_will_do(hub: dict[str, Any], tmp_path: Path) -> None:
    def offline(*args: object) -> Any:
        raise errors.OfflineModeIsEnabled("offline mode is on")

    for broken in ("hf_hub_download", "get_safetensors_metadata", "get_paths_info"):
        working, hub[broken] = hub[broken], offline
        hub["snapshot_download"] = refuse
        with pytest.raises(CheckpointError, match=r"owner/name is not a folder here.*offline mode is on"):
            outline("owner/name")
        # A snapshot that holds the config alone, as this very function leaves behind, is no checkpoint.
        hub["snapshot_download"] = lambda repo_id, local_files_only: str(tmp_path)
        with pytest.raises(CheckpointError, match="offline mode is on"):
            outline("owner/name")
        save_file({"norm": torch.ones(5, dtype=torch.float16)}, tmp_path / "model.safetensors")
        assert outline("owner/name").dtype == "float16"
        (tmp_path / "model.safetensors").unlink()
        hub[broken] = working


def test_a_repository_with_pickles_only(hub: dict[str, Any]) -> None:
    def no_safetensors(repo_id: str) -> Any:
        raise errors.NotASafetensorsRepoError("no")

    hub["get_safetensors_metadata"] = no_safetensors
    with pytest.raises(
        CheckpointError, match=r"no safetensors weights.*t.LlamaForCausalLM.from_pretrained.*owner/name"
    ):
        outline("owner/name")


def test_a_repository_without_floating_point_weights(hub: dict[str, Any]) -> None:
    files = {"a.safetensors": header(packed="I32")}
    hub["get_safetensors_metadata"] = lambda repo_id: SimpleNamespace(files_metadata=files)
    with pytest.raises(CheckpointError, match="owner/name holds no floating-point weights"):
        outline("owner/name")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "terms to be accepted"),
        (errors.RepositoryNotFoundError, "neither a folder here nor on the Hugging Face hub"),
        (errors.HfHubHTTPError, "cannot be fetched.*401 unauthorized"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(kind: type[Exception], said: str, hub: dict[str, Any]) -> None:
    def fail(*args: object) -> Any:
        # Without the response that its own constructor asks for.
        error = kind.__new__(kind)
        error.args = ("401 unauthorized\nmore",)
        raise error

    hub["hf_hub_download"] = fail
    with pytest.raises(CheckpointError, match=said) as refusal:
        outline("owner/name")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["./model", "/no/such/model", "a/b/c", ""])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="does not exist: give the folder"):
        outline(name)
