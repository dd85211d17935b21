"""A tiny video recipe, and ways to run it: in this process, in others, killed on the way."""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPE = """# A tiny one.
#
# Expect nothing of it,
# or little.
#
# Not this.
[model]
tubelet_size = [2, 7, 5]
dim = 24
n_layers = 2
n_heads = 3
head_dim = 5
ffn_dim = 31
temporal_layers = 1
positions = 0.3

[data]
format = "synthetic"
root = "{folder}/clips"
per_class = 2
held_out_per_class = 1
workers = 0
clip_frames = 6
clip_side = 16

[clips]
num_frames = 5
stride = 1
size = [15, 11]

[augment]
flip = 0.0
colour_jitter = 0.0

[optim]
epochs = 3
warmup_epochs = 0.5
lr = 0.3
batch = 12
bf16 = false

[views]
views = [2, 1]

[run]
folder = "{folder}/run"
device = "cpu"
log_every = 1
save_every = 2
"""


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


# A run in a process of its own, which kills itself before the step that it is told.
RUN = """
import os, signal, sys
from modicum.train import loop, run
step, kill = loop.Training._step, int(sys.argv[1])
def killed(self, number):
    if number == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
loop.Training._step = killed
run.train(sys.argv[2], sys.argv[4:], resume=sys.argv[3] == "resume")
"""


def run_apart(recipe: Path, overrides: list[str], *, resume: bool, kill: int = -1, world: int = 1) -> None:
    """A run in `world` new processes; `kill` is the step before which all of them die at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", RUN, str(kill), str(recipe), "resume" if resume else "begin", *overrides]
    processes = []
    for rank in range(world):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == (0 if kill < 0 else -signal.SIGKILL), errors


def begun_in(folder, name):
    return f"run.folder={folder / name}"


def weights(folder, name="state.safetensors"):
    # Copies: what a file maps changes with the file.
    return {key: tensor.clone() for key, tensor in load_file(folder / name).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))
