"""From what a user types, a folder or a Hugging Face hub id, to a local folder."""

import re
from pathlib import Path

from modicum.checkpoint.io import CONFIG, conversion_command, read_json
from modicum.errors import CheckpointError

# Weights as safetensors, configuration, tokenizer, licence; never pickles or other frameworks' weights.
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*"]
# Exports for other programs in subfolders, and Mistral's second copy of its weights.
_NOT_NEEDED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(path_or_hub_id: str | Path) -> Path:
    """An existing folder as it is, without network; else a hub id, whose needed files are downloaded with progress.

    Raises:
        CheckpointError: there is no such folder and the name cannot be a hub id, or the hub does not deliver.
    """
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
    return _downloaded(name)


def _downloaded(hub_id: str) -> Path:
    # Imported here because a local folder needs none of it.
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED))
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
    if not any(folder.glob("*.safetensors")):
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        command = conversion_command(hub_id, hub_id.split("/")[-1], config)
        raise CheckpointError(f"{hub_id} has no safetensors weights on the hub; convert them with: {command}")
    return folder


def _unreachable(hub_id: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{hub_id} is not a folder here and cannot be fetched from the Hugging Face hub ({reason}): "
        "check the name and the network, or download it first"
    )
