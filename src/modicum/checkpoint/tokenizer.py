"""Text to token ids and back, whole or token by token."""

import codecs
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from modicum.checkpoint.tokenizer_files import build_backend, has_tokenizer, json_object, token_text

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer of the `tokenizers` library together with the ids that end a text.

    `len(tokenizer)` is the highest id plus one, which may be less than the rows of a padded embedding table.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: frozenset[int] = frozenset()) -> None:
        self.backend = backend
        self.eos_ids = eos_ids
        self._length = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], config: Mapping[str, Any]) -> "Tokenizer | None":
        """From the files of a checkpoint and its config.json; None when none of them is a tokenizer's.

        The end-of-text ids are those of generation_config.json, of config.json and of the tokenizer, together.

        Raises:
            CheckpointError: files that are damaged or contradict each other.
            MissingExtraError: a format that needs `transformers`, which is not installed.
        """
        if not has_tokenizer(files):
            return None
        backend = build_backend(files, config)
        ids = stored_eos_ids(files, config)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            text = token_text(json_object(files, name).get("eos_token"))
            token_id = backend.token_to_id(text) if text else None
            ids |= _ids(token_id)
        return cls(backend, ids)

    def __len__(self) -> int:
        return self._length

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer's own template puts around it."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens, and ids that no token has, are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `decode` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def difference(self, other: "Tokenizer") -> str | None:
        """The first token in which two tokenizers differ, as a phrase; None when every id means the same in both."""
        ours, theirs = self._tokens(), other._tokens()
        for token_id in sorted(ours.keys() | theirs.keys()):
            if ours.get(token_id) != theirs.get(token_id):
                here, there = _described(ours.get(token_id)), _described(theirs.get(token_id))
                return f"token {token_id} is {here} in one and {there} in the other"
        return None

    def _tokens(self) -> dict[int, tuple[str, bool]]:
        special = self.special_ids
        return {token_id: (text, token_id in special) for text, token_id in self.backend.get_vocab().items()}


def stored_eos_ids(files: Mapping[str, bytes], config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-text ids that generation_config.json and config.json name, together."""
    return _ids(config.get("eos_token_id")) | _ids(json_object(files, "generation_config.json").get("eos_token_id"))


def _ids(value: Any) -> frozenset[int]:
    """Ids in the spellings of configuration files: one number, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return frozenset(token_id for token_id in values if isinstance(token_id, int))


def _described(token: tuple[str, bool] | None) -> str:
    if token is None:
        return "missing"
    text, special = token
    return f"{text!r} (special)" if special else repr(text)


class StreamDecoder:
    """Text as its tokens come: the pieces, joined, equal `Tokenizer.decode` of all tokens at once.

    A piece that later tokens may still change is held back: the bytes of an unfinished character and, where characters
    are spelled in byte tokens, a whole run of those, because one bad byte spoils the run. The cost per token does not
    grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._ignored = tokenizer.special_ids
        kinds = _decoder_kinds(tokenizer.backend)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if kinds == ["ByteLevel"] else None
        self._byte_tokens = "ByteFallback" in kinds
        self._context: list[int] = []  # the last token released: what follows is spelled differently at a beginning
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes, often its own, possibly none."""
        text = self._backend.id_to_token(token)
        if text is None or token in self._ignored:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(_bytes(text))
        self._pending.append(token)
        if self._byte_tokens and _BYTE_TOKEN.fullmatch(text):
            return ""
        return self._release()

    def flush(self) -> str:
        """What was held back, now that no more tokens come."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._release(final=True) if self._pending else ""

    def _release(self, final: bool = False) -> str:
        before = self._backend.decode(self._context)
        after = self._backend.decode(self._context + self._pending)
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        self._context, self._pending = self._pending[-1:], []
        return after[len(before) :]


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """The types of the steps that turn tokens into text."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level tokens spell each byte as one printable character: itself where it is one, else from 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token that is plain text stands for itself."""
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode()
