"""Files that a disk, a copy or a person has damaged: each is refused in one line, or is what it was.

    python -m pytest tests/test_damaged_runs.py

`damages` is the driver: seeded, so that a failure can be looked at. Raise `TRIES` for a longer search.
"""

import random
import shutil

import pytest
import torch
from conftest import tiny_config

from lit_llama.aligner import Aligner
from lit_llama.data import TokenDataset
from lit_llama.states import Progress, load_state, save_state
from lit_llama.tokenizer import Tokenizer

TRIES = 150


def damages(content, seed):
    """Damaged versions of a file's bytes: a flipped bit, a cut, a block of zeros, a byte too many."""
    draw = random.Random(seed)
    for _ in range(TRIES):
        at = draw.randrange(len(content))
        kind = draw.choice(["flip", "flip", "flip", "cut", "zeros", "longer"])
        if kind == "flip":
            damaged = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif kind == "cut":
            damaged = content[:at]
        elif kind == "zeros":
            damaged = content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :]
        else:
            damaged = content[:at] + b"x" + content[at:]
        if damaged != content:
            yield damaged


def read_or_refused(read):
    """What was read, or None and the message by which it was refused."""
    try:
        return read(), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def everything(dataset):
    """All that training reads of a data set."""
    items = [[(ids.tolist(), scored.tolist()) for ids, scored in dataset[i]] for i in range(len(dataset))]
    return items, dataset.lengths.tolist(), dataset.sha256, dataset.header["prompt_style"]


@pytest.mark.parametrize("name", ["ids.bin", "scored.bin", "offsets.bin", "dataset.json"])
def test_damaged_data_sets(base_dir, data_dir, tmp_path, name):
    tokenizer = Tokenizer(base_dir)
    expected = everything(TokenDataset(data_dir, "train", tokenizer))
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    file = folder / (name if name == "dataset.json" else f"train.{name}")
    content = file.read_bytes()
    for damaged in damages(content, seed=0):
        file.write_bytes(damaged)
        found, message = read_or_refused(lambda: everything(TokenDataset(folder, "train", tokenizer)))
        assert found in (None, expected)
        assert "\n" not in message
        # The header also records where the data came from, and what the other split holds.
        assert found is None or name == "dataset.json"


def test_a_data_set_of_before_is_checked_too(base_dir, data_dir, tmp_path):
    """Data sets have always recorded the hash of their tokens, which nobody compared."""
    shutil.copytree(data_dir, tmp_path / "data")
    file = tmp_path / "data" / "train.ids.bin"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data is damaged: its tokens are not those"):
        TokenDataset(tmp_path / "data", "train", Tokenizer(base_dir))


IDENTITY = {"--learning_rate": 0.03, "--decay": "linear", "--targets": ["q", "v"], "base": "0" * 64}


def trained():
    """An adapter and an optimizer that have made a step."""
    torch.manual_seed(0)
    adapter = Aligner(tiny_config(), 2)
    optimizer = torch.optim.AdamW(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return adapter, optimizer


def load(path):
    """All that a run goes on from."""
    torch.manual_seed(1)
    adapter = Aligner(tiny_config(), 2)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1.0)
    progress = load_state(path, adapter, optimizer, IDENTITY)
    return repr((adapter.state_dict(), optimizer.state_dict(), progress, torch.get_rng_state().tolist()))


def test_damaged_states(tmp_path):
    torch.set_printoptions(profile="full", precision=9)
    adapter, optimizer = trained()
    path = save_state(tmp_path, adapter, optimizer, Progress(7, 5, {"loss": 0.5}, {"loss": 1.5}), IDENTITY)
    expected = load(path)
    content = path.read_bytes()
    for damaged in damages(content, seed=0):
        path.write_bytes(damaged)
        found, message = read_or_refused(lambda: load(path))
        assert found in (None, expected)
        assert "\n" not in message
    path.write_bytes(content)
    state = torch.load(path, weights_only=True)
    del state["sha256"]
    torch.save(state, path)  # as it was before states held a hash
    assert load(path) == expected
    for name in ("adapter", "optimizer", "random"):
        torch.save({**state, name: {}}, path)
        with pytest.raises(ValueError, match="is damaged, or is not the state of a run"):
            load(path)
    torch.set_printoptions(profile="default")
