"""A tiny multi-head model that `modicum train` has made, with its text."""

from pathlib import Path

from modicum.train.run import train

RECIPE = """
[model]
dim = 24
n_layers = 2
n_heads = 4
n_kv_heads = 4
head_dim = 6
ffn_dim = 31
max_seq_len = 64
save_dtype = "float32"

[data]
source = "{source}"
held_out = 0.3
vocab_size = 300
window = 24

[optim]
steps = 30
batch = 3
lr = 1e-2
warmup = 2

[run]
folder = "{folder}"
"""
TOKENS = 30 * 3 * 24


def trained(folder: Path) -> tuple[str, str]:
    """The folders of the model and of its text."""
    source = folder / "text"
    source.mkdir()
    for number in range(13):
        lines = [f"def function_{number}_{line}(x):\n    return x * {line} + {number}\n" for line in range(20)]
        (source / f"file{number}.py").write_text("\n".join(lines))
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(source=source, folder=folder / "trained"))
    return str(train(recipe)), str(source)
