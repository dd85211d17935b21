"""Tokenizers from the files of checkpoints, and text in pieces as its tokens come."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from modicum.checkpoint.tokenizer import StreamDecoder, Tokenizer
from modicum.errors import CheckpointError, MissingExtraError

TEXTS = [
    "def greet(name):\n    return f'Hello, {name}!'\n",
    "  two leading spaces,\ttabs\r\n\n and a line\n",
    "naïve façade, größer, 日本語のテキスト, русский",
    "family 👨‍👩‍👧‍👦 flag 🏳️‍🌈 rocket 🚀🚀 done",
    "I'll we've DON'T 12345 ... ??? x²",
    "",
    " ",
]


def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE: most characters beyond ASCII are split over several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As sentencepiece models are converted: spaces as a visible mark, unknown characters as byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [
        *"abcdefghijklmnopqrstuvwxyzDENTI'{}(),.?!:\n\t0123456789",
        "▁▁",
        "▁d",
        "▁t",
        "▁f",
        "▁fl",
        "en",
        "er",
        "�",
    ]
    merges = [("▁", "▁"), ("▁", "d"), ("▁", "t"), ("▁", "f"), ("▁f", "l"), ("e", "n"), ("e", "r")]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), *[(c, -3.0) for c in "▁abcdefgh"], ("▁ab", -1.0)], 0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "play": 1, "##ing": 2, "##ed": 3, ".": 4, "n't": 5, "do": 6, "[SEP]": 7}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return backend


def without_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))


BACKENDS = [byte_level, byte_fallback, metaspace, word_piece, without_decoder]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(build: Any, text: str) -> None:
    tokenizer = Tokenizer(build())
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("build", BACKENDS)
def test_any_tokens_stream_to_what_they_decode_to(build: Any) -> None:
    # Invalid bytes, special tokens and ids beyond the vocabulary included: a model may sample any of them.
    tokenizer = Tokenizer(build())
    draw = random.Random(7)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer) + 2) for _ in range(draw.randrange(30))]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_of_one_character_and_broken_ones() -> None:
    tokenizer = Tokenizer(byte_level())
    token = {byte: tokenizer.backend.token_to_id(text) for byte, text in spelled().items()}
    cases = [
        "🚀".encode(),
        "🚀".encode()[:3],
        b"\x80\x80",
        b"\xf0\x9f",
        b"\xe2\x82a",
        b"\xff" * 40,
        b"\xf0\x9f\x98\xf0\x9f",
    ]
    for case in cases:
        ids = [token[byte] for byte in case]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == case.decode(errors="replace")
    assert streamed(tokenizer, [token[byte] for byte in "🚀".encode()]) == ["", "", "", "🚀", ""]


def spelled() -> dict[int, str]:
    """How byte-level tokens spell each byte, taken from the library rather than from the code under test."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # These bytes are in no text; they are printable and spell themselves.
    result = {byte: chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    for code in (*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 997)):
        letters = "".join(piece for piece, _ in splitter.pre_tokenize_str(chr(code)))
        result.update(zip(chr(code).encode(), letters, strict=True))
    assert len(result) == 256
    return result


def test_leading_spaces_come_with_the_word() -> None:
    tokenizer = Tokenizer(byte_fallback())
    ids = [tokenizer.backend.token_to_id(token) for token in ("<s>", "▁d", "en", "▁", "▁t", "</s>", "▁fl")]
    assert streamed(tokenizer, ids) == ["", "d", "en", " ", " t", "", " fl", ""]


def test_a_bad_byte_spoils_its_whole_run() -> None:
    # The library decodes a run of byte tokens as one; what was held back is therefore right in both cases.
    tokenizer = Tokenizer(byte_fallback())
    good = [3 + byte for byte in "é🚀".encode()]
    a = tokenizer.backend.token_to_id("a")
    assert streamed(tokenizer, [*good, a]) == [""] * len(good) + ["é🚀a", ""]
    assert streamed(tokenizer, [*good, 3 + 0xFF, a]) == [""] * (len(good) + 1) + ["\ufffd" * 7 + "a", ""]


class CountingBackend:
    """Passes everything on, and adds up how many tokens were decoded."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend, self.tokens = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        self.tokens += len(ids)
        return self.backend.decode(ids, **kwargs)


@pytest.mark.parametrize("build", BACKENDS)
def test_the_cost_of_a_token_does_not_grow(build: Any) -> None:
    tokenizer = Tokenizer(build())
    counting = CountingBackend(tokenizer.backend)
    tokenizer.backend = counting  # type: ignore[assignment]
    draw = random.Random(7)
    ids = [draw.randrange(len(tokenizer)) for _ in range(2000)]
    streamed(tokenizer, ids)
    assert counting.tokens <= 3 * len(ids)


def as_file(backend: tokenizers.Tokenizer) -> bytes:
    return backend.to_str().encode()


def test_tokenizer_json() -> None:
    tokenizer = Tokenizer.from_files({"tokenizer.json": as_file(byte_fallback())}, {})
    assert tokenizer is not None
    assert tokenizer.encode("den") == byte_fallback().encode("den").ids
    assert len(tokenizer) == byte_fallback().get_vocab_size()
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.special_ids == {0, 1, 2}


def test_truncation_and_padding_are_switched_off() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=99)
    tokenizer = Tokenizer.from_files({"tokenizer.json": as_file(backend)}, {})
    assert tokenizer is not None
    assert tokenizer.encode(TEXTS[0]) == byte_level().encode(TEXTS[0]).ids


def test_end_of_text_ids_are_the_union() -> None:
    files = {
        "tokenizer.json": as_file(byte_fallback()),
        "generation_config.json": b'{"eos_token_id": [7, 8]}',
        "tokenizer_config.json": b'{"eos_token": {"content": "</s>", "lstrip": false}}',
        "special_tokens_map.json": b'{"eos_token": "<s>"}',
    }
    tokenizer = Tokenizer.from_files(files, {"eos_token_id": 5})
    assert tokenizer is not None
    assert tokenizer.eos_ids == {1, 2, 5, 7, 8}
    tokenizer = Tokenizer.from_files({"tokenizer.json": as_file(byte_level())}, {"eos_token_id": None})
    assert tokenizer is not None
    assert tokenizer.eos_ids == frozenset()


def test_a_named_token_of_the_vocabulary_is_special() -> None:
    files = {"tokenizer.json": as_file(word_piece()), "tokenizer_config.json": b'{"eos_token": ".", "pad_token": "no"}'}
    tokenizer = Tokenizer.from_files(files, {})
    assert tokenizer is not None
    assert tokenizer.special_ids == {4, 7}
    assert tokenizer.decode([1, 4]) == "play"
    assert len(tokenizer) == 8


def byte_pair_files(backend: tokenizers.Tokenizer) -> dict[str, bytes]:
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def test_gpt2_files() -> None:
    files = byte_pair_files(byte_level())
    tokenizer = Tokenizer.from_files(files, {"model_type": "gpt2", "eos_token_id": 0})
    assert tokenizer is not None
    for text in TEXTS:
        assert tokenizer.encode(text) == byte_level().encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_files_with_a_beginning_token() -> None:
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "add_bos_token": True}
    files = byte_pair_files(byte_level()) | {"tokenizer_config.json": json.dumps(settings).encode()}
    tokenizer = Tokenizer.from_files(files, {"model_type": "opt"})
    assert tokenizer is not None
    assert tokenizer.encode("a") == [0, *byte_level().encode("a").ids]
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_byte_pair_files_encode_as_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = byte_level().get_vocab_size()
    added = {
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False},
        str(size + 2): {"content": "<|image|>", "special": True},
    }
    settings = {
        "tokenizer_class": kind,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "added_tokens_decoder": added,
    }
    files = byte_pair_files(byte_level()) | {"tokenizer_config.json": json.dumps(settings).encode()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    ours = Tokenizer.from_files(files, {})
    assert ours is not None
    assert len(ours) == size + 3
    assert ours.eos_ids == {size}
    for text in [*TEXTS, "a<|im_end|>b<tool> c<|image|><|endoftext|>", "e\u0301"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_added_tokens_at_another_id_are_refused() -> None:
    files = byte_pair_files(byte_level()) | {"added_tokens.json": b'{"<|x|>": 9999}'}
    with pytest.raises(CheckpointError, match=r"'<\|x\|>' the id 9999"):
        Tokenizer.from_files(files, {"model_type": "gpt2"})


def test_no_tokenizer_files_is_none() -> None:
    assert Tokenizer.from_files({}, {}) is None
    assert Tokenizer.from_files({"generation_config.json": b"{}", "README.md": b"", "model.txt": b""}, {}) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "qwen.tiktoken", "tokenizer_config.json"])
def test_other_formats_need_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"{name}.*pip install 'modicum\[hf\]'"):
        Tokenizer.from_files({name: b"{}"}, {})


def test_other_formats_go_through_transformers() -> None:
    pytest.importorskip("transformers")
    files = {
        "vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing"]).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}',
    }
    tokenizer = Tokenizer.from_files(files, {"model_type": "bert"})
    assert tokenizer is not None
    assert tokenizer.encode("playing") == [2, 5, 6, 3]
    assert tokenizer.decode([2, 5, 6, 3]) == "playing"


def sentence_pieces() -> bytes:
    """A SentencePiece vocabulary as T5's: padding, end, unknown, then pieces with their scores."""
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    plain = [*"abcdefghijklmnopqrstuvwxyz.,", "▁", "▁the", "▁in", "at", "▁hat"]
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((piece, 1) for piece in plain)]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-0.1 * number if kind == 1 else 0.0, type=kind)
    model.trainer_spec.model_type = 1
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    return model.SerializeToString()


PLAIN = [
    "the cat in the hat",
    " two  spaces\nand a line",
    "the <extra_id_0> hat <extra_id_1>.",
    "ünknown</s> ends",
    ".",
]


def test_t5_as_transformers_reads_it(tmp_path: Path) -> None:
    """From the SentencePiece file alone and from tokenizer.json: the same ids, with the end that an encoder is given."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "spiece.model").write_bytes(sentence_pieces())
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "fast")
    for folder in (tmp_path, tmp_path / "fast"):
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        assert ("tokenizer.json" in files) == (folder != tmp_path)
        ours = Tokenizer.from_files(files, {"model_type": "t5", "eos_token_id": 1})
        assert ours is not None
        assert ours.eos_ids == {1}
        assert len(ours) == len(theirs) == 36 + 100
        for text in PLAIN:
            ids = ours.encode(text)
            assert ids == theirs(text).input_ids
            assert ids[-1] == 1
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            stream = StreamDecoder(ours)
            assert "".join([*map(stream.feed, ids), stream.flush()]) == ours.decode(ids)


def test_sentence_pieces_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(MissingExtraError, match=r"spiece.model\) needs `sentencepiece`.*pip install 'modicum\[hf\]'"):
        Tokenizer.from_files({"spiece.model": b""}, {"model_type": "t5"})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": b"{"}, "cannot be read"),
        ({"tokenizer.json": b"\xff"}, "cannot be read"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, "tokenizer_config.json holds list"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b c"}, "not two tokens"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b"}, "cannot be read"),
    ],
)
def test_damaged_files_are_one_sentence(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as refusal:
        Tokenizer.from_files(files, {"model_type": "gpt2"})
    assert "\n" not in str(refusal.value)


def test_difference_names_the_first_token() -> None:
    first, second = Tokenizer(word_piece()), Tokenizer(word_piece())
    assert first.difference(second) is None
    vocab = {"[UNK]": 0, "play": 1, "##ed": 2, "##ing": 3, ".": 4, "n't": 5, "do": 6, "[SEP]": 7}
    swapped = Tokenizer(tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")))
    assert first.difference(swapped) == "token 2 is '##ing' in one and '##ed' in the other"
    second.backend.add_tokens(["extra"])
    assert first.difference(second) == "token 8 is missing in one and 'extra' in the other"
    third = Tokenizer(word_piece())
    third.backend.add_special_tokens([AddedToken("do")])
    assert first.difference(third) == "token 6 is 'do' in one and 'do' (special) in the other"
