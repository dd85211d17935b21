"""The benchmark beside other engines runs without them, says so, and notices another model and a dead process."""

import sys
import venv
from contextlib import ExitStack

import pytest

from benchmarks import text_peers
from benchmarks.text_peers import LLAMA, MODICUM, OPENVINO, System


def measured(engine: str, precision: str, mode: str, tokens: list[int], token_ms: list[float]) -> System:
    return System(engine, precision, mode, tokens=tokens, first_ms=[1.0], token_ms=token_ms)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """A Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    return str(folder / "bin" / "python")


def test_without_the_peers_ours_is_measured_and_theirs_are_named(tmp_path, capsys, bare_python):
    out = tmp_path / "result.md"
    arguments = ["--peer-python", bare_python, "--precision", "float32", "--mode", "plain", "lookup", "--threads", "1"]
    text_peers.main([*arguments, "--tokens", "5", "--rounds", "2", "--out", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out == text
    assert "Peers: none of them." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    plain, lookup = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    for row, mode in ((plain, "plain"), (lookup, "lookup")):
        assert (row["decoding"], row["precision"], row["system"]) == (mode, "float32", "modicum")
        assert (row["over modicum's"], row["tokens as float32"]) == ("1.00", "6 of 6")
        assert 0 < float(row["min"]) <= float(row["ms/token"]) <= float(row["max"])
    assert "OpenVINO GenAI was not measured: `openvino" in text or "OpenVINO GenAI was not measured: `numpy`" in text
    assert "llama.cpp was not measured: `llama_cpp` is not installed: `CMAKE_ARGS=" in text


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        text_peers.main(["--out", str(tmp_path / "absent" / "result.md")])
    assert "there is no folder" in capsys.readouterr().err


def test_a_system_that_dies_is_named_with_its_last_words(tmp_path):
    spec = {"target": str(tmp_path / "absent"), "draft": None, "prompt": [3, 5], "work": str(tmp_path), "k": 2}
    spec |= {"threads": 1, "max_tokens": 7}
    with ExitStack() as stack, pytest.raises(SystemExit, match=r"modicum float32 plain: .*absent"):
        System(MODICUM, "float32", "plain").start(sys.executable, spec, stack)


def test_what_each_engine_has():
    chosen = text_peers.systems(["bfloat16", "int8"], ["draft", "plain"])
    assert [str(system) for system in chosen] == [
        "modicum float32 plain",
        "modicum bfloat16 draft",
        "OpenVINO GenAI bfloat16 draft",
        "modicum bfloat16 plain",
        "OpenVINO GenAI bfloat16 plain",
        "llama.cpp bfloat16 plain",
        "OpenVINO GenAI int8 draft",
        "OpenVINO GenAI int8 plain",
        "llama.cpp int8 plain",
    ]
    assert text_peers.not_offered(["bfloat16", "int8"], ["draft", "plain"]) == ["modicum int8", "llama.cpp draft"]


def test_agreement_counts_the_first_tokens_alone():
    assert text_peers.agreeing([7, 8, 9, 4], [7, 8, 5, 4]) == 2
    assert text_peers.agreeing([7, 8], [7, 8]) == 2
    assert text_peers.agreeing([1, 8], [7, 8]) == 0


def test_ratios_are_to_modicum_in_the_same_mode_and_precision():
    running = [
        measured(MODICUM, "float32", "plain", [1], [8.0, 2.0, 4.0]),
        measured(MODICUM, "bfloat16", "plain", [1], [2.0]),
        measured(OPENVINO, "float32", "plain", [1], [3.0, 1.0, 9.0]),
        measured(LLAMA, "int8", "plain", [1], [5.0]),
        measured(OPENVINO, "float32", "draft", [1], [5.0]),
    ]
    assert [text_peers.beside(system, running) for system in running] == [1.0, 1.0, 0.75, 2.5, None]


def test_another_model_ends_the_run_in_float32_alone():
    tokens = list(range(19))
    ours = measured(MODICUM, "float32", "plain", tokens, [1.0])
    text_peers.check_model([ours, measured(LLAMA, "float32", "plain", [*tokens[:16], 0, 17, 18], [1.0])])
    text_peers.check_model([ours, measured(LLAMA, "int8", "plain", [0, 0, *tokens[2:]], [1.0])])
    with pytest.raises(SystemExit, match="llama.cpp float32 plain runs another model.*the first 15 tokens agree"):
        text_peers.check_model([ours, measured(LLAMA, "float32", "plain", [*tokens[:15], 0, *tokens[16:]], [1.0])])
    # Of fewer than that all have to agree.
    with pytest.raises(SystemExit, match="the first 1 tokens agree"):
        text_peers.check_model(
            [measured(MODICUM, "float32", "plain", [3, 5], [1.0]), measured(LLAMA, "float32", "plain", [3, 4], [1.0])]
        )


@pytest.fixture
def other_worker(tmp_path, monkeypatch):
    """Starts a system whose process says that it is ready and then runs the given lines."""
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(text_peers, "WORKER", worker)
    with ExitStack() as stack:

        def start(*lines: str) -> System:
            worker.write_text("\n".join(["print('{}', flush=True)", *lines]))
            system = System(LLAMA, "float32", "plain")
            system.start(sys.executable, {"threads": 1}, stack)
            return system

        yield start


def test_another_count_of_tokens_than_asked_ends_the_run(other_worker):
    system = other_worker("input()", """print('{"seconds": 2, "tokens": [4, 5]}', flush=True)""", "input()")
    with pytest.raises(SystemExit, match="llama.cpp float32 plain: asked for 3 tokens, it generated 2"):
        system.ask(3)


def test_a_system_that_is_killed_between_two_questions_is_named(other_worker):
    system = other_worker("input()", """print('{"seconds": 2, "tokens": [4, 5]}', flush=True)""", "raise OSError(77)")
    assert system.ask(2) == (2000.0, [4, 5])
    assert system.process.wait() == 1
    with pytest.raises(SystemExit, match="llama.cpp float32 plain: OSError: 77"):
        system.ask(2)
