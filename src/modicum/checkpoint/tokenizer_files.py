"""Building a tokenizer of the `tokenizers` library from the files of a checkpoint."""

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from modicum.errors import CheckpointError, MissingExtraError

# Files that say which tokens there are; settings alone, such as generation_config.json, make no tokenizer.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# How Qwen 2 and 3 cut text into the pieces that byte pairs are merged in: contractions, letters with one leading
# character, single digits, punctuation with its line ends, line ends, spaces.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether any of the files holds a vocabulary, of whatever kind."""
    return any(name in _VOCABULARIES or name.startswith("tokenizer") or name.endswith(".tiktoken") for name in files)


def build_backend(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that tokenizer.json describes, or vocab.json with merges.txt; others by way of `transformers`.

    Raises:
        CheckpointError: a file is damaged, or files contradict each other.
        MissingExtraError: the format needs `transformers`, which is not installed.
    """
    settings = json_object(files, "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    family = str(config.get("model_type", ""))
    pair = "vocab.json" in files and "merges.txt" in files
    try:
        if "tokenizer.json" in files:
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        elif pair and (kind == "Qwen2Tokenizer" or (not kind and family.startswith("qwen"))):
            backend = _byte_pairs(files, settings, qwen=True)
        elif pair and (kind == "GPT2Tokenizer" or (not kind and family == "gpt2")):
            backend = _byte_pairs(files, settings, qwen=False)
        else:
            backend = _through_transformers(files, config)
    except (CheckpointError, MissingExtraError):
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for malformed files
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"the tokenizer files cannot be read ({reason}): download them again") from error
    # Stored by some checkpoints for training; a prompt is never cut or padded here.
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, files, settings)
    if pair and "tokenizer.json" not in files:
        _add_template(backend, settings)
    return backend


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file, or an empty one when the file is not there."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON ({error}): repair it or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds {type(value).__name__} instead of a JSON object: repair it")
    return value


def token_text(value: Any) -> str | None:
    """A token in one of its spellings: the text, or an object with the text as `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _byte_pairs(files: Mapping[str, bytes], settings: Mapping[str, Any], *, qwen: bool) -> tokenizers.Tokenizer:
    lines = files["merges.txt"].decode().split("\n")
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError("merges.txt has lines that are not two tokens: download it again")
    backend = tokenizers.Tokenizer(models.BPE(vocab=json_object(files, "vocab.json"), merges=merges))  # type: ignore[arg-type]
    prefix_space = bool(settings.get("add_prefix_space"))
    if qwen:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_QWEN_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, files: Mapping[str, bytes], settings: Mapping[str, Any]) -> None:
    """Tokens beyond the vocabulary, at the ids that the settings give them, and the special ones marked as such."""
    given: dict[int, Any] = {}
    for text, token_id in json_object(files, "added_tokens.json").items():
        given[int(token_id)] = text
    for key, value in (settings.get("added_tokens_decoder") or {}).items():
        given[int(key)] = value
    named = [token_text(settings.get(name)) for name in _NAMED_TOKENS]
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, value in sorted(given.items()):
        token = _added_token(value, named)
        if token.content not in present:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"the tokenizer files give {token.content!r} the id {token_id}, and its place in the vocabulary is "
                f"{backend.token_to_id(token.content)}: download files that belong together"
            )
        present.add(token.content)
    known = [text for text in named if text and text not in present and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in known])


def _added_token(value: Any, named: list[str | None]) -> AddedToken:
    if not isinstance(value, dict):
        return AddedToken(value, special=value in named, normalized=False)
    flags = {key: bool(value[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value}
    return AddedToken(value["content"], special=bool(value.get("special")) or value["content"] in named, **flags)


def _add_template(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Begin and end tokens around a prompt, where the settings ask for them. tokenizer.json has its own template."""
    parts, special = ["$A"], []
    for name, place in (("bos", 0), ("eos", 1)):
        text = token_text(settings.get(f"{name}_token"))
        token_id = backend.token_to_id(text) if text else None
        if settings.get(f"add_{name}_token") and text and token_id is not None:
            parts.insert(place and len(parts), text)
            special.append((text, token_id))
    if special:
        backend.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)


def _through_transformers(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    # It reads a vocabulary of SentencePiece with that package's help.
    needed = ["transformers"] + ["sentencepiece"] * any(name.endswith(".model") for name in files)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            names = ", ".join(name for name in sorted(files) if has_tokenizer({name: b""}))
            raise MissingExtraError(package, "hf", f"a tokenizer without tokenizer.json ({names})")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, "config.json": json.dumps(config).encode()}.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no form in the tokenizers library: "
            "give prompts as token ids"
        )
    return backend
