"""From what a user types, a folder or a Hugging Face hub id, to a local folder."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.checkpoint.io import CONFIG, conversion_command, read_checkpoint, read_json
from modicum.errors import CheckpointError

# Weights as safetensors, configuration, tokenizer, licence; never pickles or other frameworks' weights.
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*"]
# Exports for other programs in subfolders, and Mistral's second copy of its weights.
_NOT_NEEDED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# Floating-point dtypes in a safetensors header, and in PyTorch.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights: config.json as read, what the weights are stored in, and their files' size."""

    config: dict[str, Any]
    dtype: str
    file_bytes: int


def resolve(path_or_hub_id: str | Path) -> Path:
    """An existing folder as it is, without network; else a hub id, whose needed files are downloaded with progress.

    Raises:
        CheckpointError: there is no such folder and the name cannot be a hub id, or the hub does not deliver.
    """
    return _local_folder(path_or_hub_id) or _downloaded(str(path_or_hub_id))


def outline(path_or_hub_id: str | Path) -> Outline:
    """What a checkpoint is: of one on the hub, only config.json and the headers of its weights are fetched.

    Raises:
        CheckpointError: as `resolve`.
    """
    folder = _local_folder(path_or_hub_id)
    return _outline_on_hub(str(path_or_hub_id)) if folder is None else _outline_of(folder)


def _local_folder(path_or_hub_id: str | Path) -> Path | None:
    """The folder of that name; None if there is none and the name is a hub id."""
    name = str(path_or_hub_id)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # `~user` of an unknown user
        path = Path(name)
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json and model.safetensors")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name or 'an empty name'} does not exist: give the folder of a checkpoint, or a hub id such as owner/name"
        )
    return None


def _outline_of(folder: Path) -> Outline:
    checkpoint = read_checkpoint(folder)
    dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.state_dict.values())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Outline(checkpoint.config, _first_float(str(folder), dtypes), size)


def _outline_on_hub(hub_id: str) -> Outline:
    # Imported here because a local folder needs none of it.
    from huggingface_hub import errors, get_paths_info, get_safetensors_metadata, hf_hub_download

    with _refusals(hub_id):
        try:
            config = read_json(Path(hf_hub_download(hub_id, CONFIG)))
            headers = get_safetensors_metadata(hub_id).files_metadata
            size = sum(getattr(file, "size", 0) for file in get_paths_info(hub_id, sorted(headers)))
        except (errors.HTTPError, OSError):
            # Without a connection, what was downloaded before will do.
            folder = _downloaded_before(hub_id)
            if folder is None:
                raise
            return _outline_of(folder)
        except errors.NotASafetensorsRepoError as error:
            raise CheckpointError(_pickles_only(hub_id, config)) from error
    dtypes = (_DTYPES.get(tensor.dtype, "") for file in sorted(headers) for tensor in headers[file].tensors.values())
    return Outline(config, _first_float(hub_id, dtypes), size)


def _first_float(where: str, dtypes: Iterable[str]) -> str:
    """What the weights are stored in. Masks that older files hold beside them are integers, which no model computes in."""
    for dtype in dtypes:
        if dtype in _DTYPES.values():
            return dtype
    raise CheckpointError(f"{where} holds no floating-point weights: give a checkpoint that does")


def _downloaded_before(hub_id: str) -> Path | None:
    """The folder of an earlier download with its weights, without network."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import model_info, snapshot_download

    with _refusals(hub_id):
        folder = Path(snapshot_download(hub_id, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED))
        if not any(folder.glob("*.safetensors")):
            # Without a connection the client hands over what an earlier call left, which may be an outline's config.json.
            model_info(hub_id)
    if not any(folder.glob("*.safetensors")):
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        raise CheckpointError(_pickles_only(hub_id, config))
    return folder


@contextmanager
def _refusals(hub_id: str) -> Iterator[None]:
    """What the hub's client raises, as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        reason = "asks for its terms to be accepted: do so on its page, then run `hf auth login`"
        raise CheckpointError(f"{hub_id} on the Hugging Face hub {reason}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor on the Hugging Face hub: check the name, and `hf auth login` "
            "if it is private"
        ) from error
    except (errors.HTTPError, OSError) as error:  # offline and connection errors are both
        raise CheckpointError(_unreachable(hub_id, error)) from error


def _pickles_only(hub_id: str, config: dict[str, Any]) -> str:
    command = conversion_command(hub_id, hub_id.split("/")[-1], config)
    return f"{hub_id} has no safetensors weights on the hub; convert them with: {command}"


def _unreachable(hub_id: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{hub_id} is not a folder here and cannot be fetched from the Hugging Face hub ({reason}): "
        "check the name and the network, or download it first"
    )
