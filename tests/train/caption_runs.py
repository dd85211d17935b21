"""Tiny recipes of a captioner and its draft, and four clips that no two captions describe."""

import json
from pathlib import Path

import numpy as np

from modicum.video.synthetic import Event, Scene, render, write_clip

ENCODER = """[encoder]
tubelet_size = [2, 7, 5]
dim = 24
n_layers = 1
n_heads = 3
head_dim = 5
ffn_dim = 31
temporal_layers = 1
positions = 0.3
"""

RECIPE = """# A tiny captioner.
#
# Expect nothing
# of it.

{model}
[decoder]
dim = 20
n_layers = 2
n_heads = 2
ffn_dim = 29
vocab_size = 300

[data]
format = "synthetic"
root = "{folder}/clips"
n_clips = 13
n_held_out = 4
workers = 0
clip_frames = 6
clip_side = 16

[clips]
num_frames = 5
stride = 1
size = [14, 10]

[optim]
epochs = 3
warmup_epochs = 0.5
optimizer = "adamw"
lr = 0.01
batch = 4
bf16 = false
label_smoothing = 0.1

[run]
folder = "{folder}/run"
device = "cpu"
log_every = 1
save_every = 2
"""


def write_recipe(folder: Path, name: str = "tiny.toml", model: str = ENCODER) -> Path:
    path = folder / name
    path.write_text(RECIPE.format(folder=folder, model=model))
    return path


SCENES = [
    Scene((Event(1, "red", "circle", "stays still"),)),
    Scene((Event(2, "blue", "square", "stays still"),)),
    Scene((Event(3, "white", "ring", "stays still"),)),
    Scene((Event(1, "green", "bar", "stays still"), Event(1, "yellow", "cross", "stays still"))),
]


def write_four(folder: Path) -> list[str]:
    """Four clips in `folder`, twice, once for each split, in MSR-VTT's layout and in VATEX's; returns their captions.

    In VATEX's the first video has a second caption, and of the third one there is no file.
    """
    captions = [scene.caption for scene in SCENES]
    videos, sentences, vatex = [], [], []
    for split in ("train", "test"):
        for number, scene in enumerate(SCENES):
            name = f"{split}{number}"
            clip = render(scene, np.random.default_rng(number), 8, 32)
            write_clip(folder / f"{name}.mp4", clip)
            write_clip(folder / f"v{name}_000000_000010.mp4", clip)
            videos.append({"id": len(videos), "video_id": name, "category": 0, "split": split})
            sentences.append({"sen_id": len(sentences), "video_id": name, "caption": captions[number]})
            extra = ["red it is"] * (number == 0)
            vatex.append({"videoID": f"v{name}_000000_000010", "enCap": [captions[number], *extra]})
    (folder / "vtrain2_000000_000010.mp4").unlink()
    (folder / "captions.json").write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    for split in ("train", "test"):
        rows = [row for row in vatex if str(row["videoID"]).startswith(f"v{split}")]
        (folder / f"vatex_{split}.json").write_text(json.dumps(rows))
    return captions
