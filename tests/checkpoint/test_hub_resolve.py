"""From a name to a folder, without any network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from modicum.checkpoint.hub import resolve
from modicum.errors import CheckpointError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network must not be used")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_an_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("name", ["./model", "/no/such/model", "a/b/c", "~/nothing", "../x", "name/", "", "two words"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist: give the folder"):
        resolve(name)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(Path("owner") / "name")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "model.safetensors")


def test_only_what_is_needed_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = ["model.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin", "onnx/model.json", "tf.h5",
               "consolidated.safetensors", "LICENSE", "flax_model.msgpack", "merges.txt"]  # fmt: skip
    taken: list[str] = []

    def download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        kept = huggingface_hub.utils.filter_repo_objects(
            offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        taken.extend(kept)
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name") == tmp_path
    assert taken == ["model.safetensors", "config.json", "tokenizer.model", "LICENSE", "merges.txt"]


def raising(error: Exception) -> Any:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    return download


def with_response(kind: type[Exception]) -> Exception:
    """An error of the hub's client, without the response that its own constructor asks for."""
    error = kind.__new__(kind)
    error.args = ("401 unauthorized\nmore",)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            errors.LocalEntryNotFoundError("nothing in the cache\nsecond line"),
            "cannot be fetched.*nothing in the cache",
        ),
        (errors.OfflineModeIsEnabled("offline mode is on"), "cannot be fetched.*offline mode is on"),
        (ConnectionError("no route"), "no route"),
        (errors.HFValidationError("bad"), "check the name"),
        (with_response(errors.RepositoryNotFoundError), "neither a folder here nor on the Hugging Face hub"),
        (with_response(errors.GatedRepoError), "terms to be accepted"),
        (with_response(errors.HfHubHTTPError), "cannot be fetched.*401 unauthorized"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(CheckpointError, match=said) as refusal:
        resolve("owner/name")
    assert "owner/name" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_repository_with_pickles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["OPTForCausalLM"]}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    with pytest.raises(CheckpointError, match=r"no safetensors weights.*t.OPTForCausalLM.from_pretrained.*owner/name"):
        resolve("owner/name")


def test_offline_with_nothing_but_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `inspect` leaves behind is no sign of a repository without safetensors."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", raising(errors.OfflineModeIsEnabled("offline mode is on")))
    with pytest.raises(CheckpointError, match="cannot be fetched.*offline mode is on"):
        resolve("owner/name")
