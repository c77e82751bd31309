"""A run takes its own files for its own, and nothing else that its folder holds."""

import shutil

import pytest
from conftest import random_aligner

from lit_llama.adapters import save_adapter
from lit_llama.checkpoint import read_config
from lit_llama.run_files import check_out_dir, set_aside

OWN = ["aligner.safetensors", "lora.safetensors", "adapter.safetensors", "state-00000012.pt", "metrics.csv", "loss.png"]
OWN += ["hyperparameters.yaml", "report.json", "report.txt", "tensorboard/events", "wandb/run"]
OTHERS = ["model.safetensors", "customers.csv", "photo.png", "settings.yaml", "weights.pt", "my-state-1.pt"]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_of_others_stay_where_they_are(tmp_path):
    for name in OWN + OTHERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    set_aside(tmp_path)
    assert files(tmp_path) == sorted([*OTHERS, *(f"previous-1/{name}" for name in OWN)])
    set_aside(tmp_path)
    assert not (tmp_path / "previous-2").exists()


@pytest.mark.parametrize("kind", ["lit", "hf"])
def test_the_folder_of_a_base_is_refused(command, base_dir, hf_checkpoint, data_dir, tmp_path, kind):
    folder = shutil.copytree({"lit": base_dir, "hf": hf_checkpoint}[kind], tmp_path / "base")
    before = files(folder)
    status, _, err = command("finetune/aligner.py", checkpoint_dir=base_dir, data_dir=data_dir, out_dir=folder)
    assert (status, "so it is a base model's folder: choose another one for the run" in err) == (1, True)
    assert files(folder) == before


def test_adapters_that_the_run_would_move_away_are_refused(command, base_dir, data_dir, tmp_path):
    """They are read again when it is resumed; those with names of their own, or moved away already, stay."""
    for name in ("aligner", "mine", "previous-1/aligner"):
        save_adapter(tmp_path / f"{name}.safetensors", random_aligner(read_config(base_dir), 1))
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    for path in (tmp_path, tmp_path / "aligner.safetensors", tmp_path / "previous-1/../aligner.safetensors"):
        status, _, err = command("finetune/aligner.py", also_adapter=path, **options)
        assert (status, "the folder of this run, which would move it away" in err) == (1, True)
    check_out_dir(tmp_path, [tmp_path / "mine.safetensors", tmp_path / "previous-1"])
