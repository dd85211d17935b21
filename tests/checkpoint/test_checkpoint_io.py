"""Checkpoint folders: lazy reading, atomic writing, and each refusal."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.checkpoint import io
from modicum.checkpoint.io import Checkpoint, conversion_command, read_checkpoint, write_checkpoint
from modicum.errors import CheckpointError, UsageError

TENSORS = {
    "a.weight": torch.arange(35.0).view(5, 7),
    "b.weight": torch.arange(11.0).to(torch.bfloat16),
    "c.weight": torch.arange(39).view(3, 13),
}
FILES = {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": 3}', "LICENSE": b"do as you like"}


def checkpoint(**changes: Tensor) -> Checkpoint:
    return Checkpoint({"model_type": "llama", "note": "é"}, TENSORS | changes, dict(FILES))


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_round_trip_in_one_file(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "new" / "folder")
    ckpt = read_checkpoint(tmp_path / "new" / "folder")
    assert ckpt.config == checkpoint().config
    assert ckpt.files == FILES
    assert same(ckpt.state_dict, TENSORS)
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "model.safetensors", *FILES}
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_round_trip_in_shards(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out", shard_bytes=170)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.weight": "model-00001-of-00002.safetensors",
        "c.weight": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 35 * 4 + 11 * 2 + 39 * 8
    ckpt = read_checkpoint(tmp_path / "out")
    assert same(ckpt.state_dict, TENSORS)
    assert ckpt.files == FILES


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    sizes = {"vocab_size": 31, "hidden_size": 14, "intermediate_size": 5, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=7, bos_token_id=None, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    write_checkpoint(read_checkpoint(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=3000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    big = {f"t{i}": torch.full((1024, 1024), float(i)) for i in range(12)}
    write_checkpoint(Checkpoint({}, big), tmp_path / "big")
    del big
    gc.collect()
    before = resident_anonymous()
    ckpt = read_checkpoint(tmp_path / "big")
    total = sum(ckpt.state_dict[name].sum().item() for name in ckpt.state_dict)
    assert total == 66 * 2**20
    # 48 MiB of tensors went by; what stays is less than three of them, even where reading copies.
    assert resident_anonymous() - before < 12 * 2**20


def resident_anonymous() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Stream(Mapping[str, Tensor]):
    """Makes tensors when asked, and knows how many of them are alive."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.alive, self.most = names, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        class Counted(torch.Tensor):
            def __del__(counted) -> None:
                self.alive -= 1

        self.alive += 1
        self.most = max(self.most, self.alive)
        return torch.zeros(25).as_subclass(Counted)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_writing_holds_one_shard(tmp_path: Path) -> None:
    stream = Stream([f"t{i}" for i in range(20)])
    write_checkpoint(Checkpoint({}, stream), tmp_path / "out", shard_bytes=300)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 7
    # Three make a shard, one is in hand, and the one before may not have been collected yet.
    assert stream.most <= 5


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(30.0).view(5, 6)
    given = {
        "tied": base,
        "twin": base,
        "turned": base.T,
        "part": base[1:3],
        "learned": torch.nn.Parameter(base[:2, ::2]),
    }
    write_checkpoint(Checkpoint({}, given), tmp_path / "out")
    assert same(read_checkpoint(tmp_path / "out").state_dict, {name: tensor.detach() for name, tensor in given.items()})


def test_changing_a_tensor_that_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out")
    read_checkpoint(tmp_path / "out").state_dict["a.weight"].add_(1)
    assert same(read_checkpoint(tmp_path / "out").state_dict, TENSORS)


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_checkpoint(checkpoint(), tmp_path / "empty")
    with pytest.raises(UsageError, match=r"already holds files.*overwrite"):
        write_checkpoint(checkpoint(), tmp_path / "empty")
    (tmp_path / "empty" / "stale.txt").write_text("old")
    write_checkpoint(Checkpoint({"new": 1}, TENSORS), tmp_path / "empty", overwrite=True)
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        write_checkpoint(checkpoint(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_can_overwrite_the_folder_it_comes_from(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out")
    write_checkpoint(read_checkpoint(tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert same(read_checkpoint(tmp_path / "out").state_dict, TENSORS)


class Failing(Stream):
    def __init__(self, error: BaseException) -> None:
        super().__init__(["t0", "t1"])
        self.error = error

    def __getitem__(self, name: str) -> Tensor:
        if name == "t1":
            raise self.error
        return torch.zeros(3)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left"), RuntimeError("broken")])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, error: BaseException, exists: bool) -> None:
    if exists:
        write_checkpoint(checkpoint(), tmp_path / "out")
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_checkpoint(Checkpoint({}, Failing(error)), tmp_path / "out", overwrite=True)
    if exists:
        assert same(read_checkpoint(tmp_path / "out").state_dict, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * exists


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("device is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="device is gone"):
        write_checkpoint(Checkpoint({}, {}), tmp_path / "out", overwrite=True)
    assert same(read_checkpoint(tmp_path / "out").state_dict, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(checkpoint(), tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["../escape.json", "config.json", "model.safetensors", "", ".."])
def test_file_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain file names"):
        write_checkpoint(Checkpoint({}, TENSORS, {name: b""}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def no_folder(folder: Path) -> None:
    os.rename(folder, folder.with_name("elsewhere"))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_cut_off(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / io.INDEX).unlink()


def shard_missing(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_cut_off(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def shard_corrupted(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"?" * 60 + path.read_bytes()[68:])


def shard_empty(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def shard_of_something_else(folder: Path) -> None:
    save_file({"z": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")


def index_cut_off(folder: Path) -> None:
    (folder / io.INDEX).write_text('{"weight_map"')


def index_without_map(folder: Path) -> None:
    (folder / io.INDEX).write_text("{}")


def index_leads_away(folder: Path) -> None:
    (folder / io.INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_folder, "does not exist"),
        (no_config, "has no config.json"),
        (config_cut_off, "config.json is not valid JSON"),
        (config_is_a_list, "config.json holds list"),
        (no_weights, "neither model.safetensors nor model.safetensors.index.json"),
        (shard_missing, "names model-00002-of-00002.safetensors, which is missing"),
        (shard_cut_off, "model-00002-of-00002.safetensors is not a complete safetensors file"),
        (shard_corrupted, "model-00002-of-00002.safetensors is not a complete safetensors file"),
        (shard_empty, "model-00002-of-00002.safetensors is not a complete safetensors file"),
        (shard_of_something_else, "`c.weight` in model-00002-of-00002.safetensors, which lacks it"),
        (index_cut_off, "index.json is not valid JSON"),
        (index_without_map, "no `weight_map`"),
        (index_leads_away, "files beside it are required"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out", shard_bytes=170)
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(tmp_path / "out")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        read_checkpoint(tmp_path / "out" / "model.safetensors")


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = tmp_path / "it's old"
    write_checkpoint(Checkpoint({"architectures": ["GPT2LMHeadModel"]}, TENSORS), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(folder)
    assert conversion_command(str(folder), str(folder), {"architectures": ["GPT2LMHeadModel"]}) in str(refusal.value)


def test_the_command_converts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "it's old"
    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=31, n_embd=14, n_layer=1, n_head=7, n_positions=5)
    model = transformers.GPT2LMHeadModel(config)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(folder)
    command = str(refusal.value).split("with: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    state_dict = read_checkpoint(folder).state_dict
    assert torch.equal(state_dict["transformer.wte.weight"], model.transformer.wte.weight)


def test_files_that_travel(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "out")
    for name in ("README.md", "merges.txt", "spiece.model", "chat_template.jinja", "pytorch_model.bin.index.json"):
        (tmp_path / "out" / name).write_text(name)
    (tmp_path / "out" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "out" / "onnx").mkdir()
    carried = {"README.md", "merges.txt", "spiece.model", "chat_template.jinja", *FILES}
    assert set(read_checkpoint(tmp_path / "out").files) == carried


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path):
    goal = tmp_path / "model"
    write_checkpoint(Checkpoint({"model_type": "llama"}, {"x": torch.zeros(2)}, {"a.txt": b"a"}), goal)
    wanted = goal.stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o777 for file in goal.iterdir()} == {wanted}
