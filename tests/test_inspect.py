"""What inspect_adapter.py says, against numbers put in by hand."""

import torch
from conftest import DEMO_BASE, tiny_config

from lit_llama.adapters import save_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.lora import LoRA


def made_by_hand(path, length=2, sign=1.0):
    aligner = Aligner(tiny_config(), length, start_layer=1)
    with torch.no_grad():
        aligner.tokens.zero_()
        aligner.tokens[0, 0], aligner.tokens[-1, 1] = 3.0, 4.0
        aligner.gates.copy_(sign * torch.tensor([[0.1, -0.1, 0.1, -0.1], [0.5, 0.5, 0.5, -0.7], [0.0, 0.2, 0.2, 0.0]]))
    save_adapter(path, aligner, step=7, validation_loss=0.25, prompt_style="chat", hyperparameters={"seed": 3})
    return path


def test_facts_and_picture(command, tmp_path):
    file = made_by_hand(tmp_path / "a.safetensors")
    status, out, err = command("scripts/inspect_adapter.py", aligner_path=file, output_path=tmp_path / "gates.png")
    assert status == 0, err
    facts = {line[2:30].strip(): line[30:] for line in out.splitlines()[1:]}
    assert facts["prefix tokens"] == "2 of 32 numbers"
    assert facts["gates"] == "layers 1 to 3, 4 heads each"
    assert facts["parameters"] == str(2 * 32 + 3 * 4)
    assert facts["mean |gate|"] == "0.2500, largest in layer 2 (0.5500)"
    assert facts["largest |gate|"] == "0.7000; 58% of the gates are positive"
    assert facts["token norms"] == "3.000 to 4.000, mean 3.500"
    assert facts["cosines between tokens"] == "0.000 to 0.000, mean 0.000"
    assert (facts["best step"], facts["validation loss"], facts["seed"]) == ("7", "0.2500", "3")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_next_to_the_adapter(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_by_hand(tmp_path / "run" / "aligner.safetensors")
    for path in ("run/aligner.safetensors", "run"):
        status, _, err = command("scripts/inspect_adapter.py", adapter_path=path)
        assert (status, err) == (0, "picture: run/aligner.png\n")
        (tmp_path / "run" / "aligner.png").unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_two_are_compared(command, tmp_path, monkeypatch):
    first = made_by_hand(tmp_path / "a.safetensors")
    second = made_by_hand(tmp_path / "b.safetensors", sign=-1.0)
    longer = made_by_hand(tmp_path / "c.safetensors", length=3)
    arguments = {"output_path": tmp_path / "gates.png"}
    _, out, _ = command("scripts/inspect_adapter.py", f"--aligner_path={second}", aligner_path=first, **arguments)
    assert "tokens: cosine 1.0000, |a - b| / |a| 0.0000" in out
    assert "gates: cosine -1.0000, |a - b| / |a| 2.0000, largest 1.4000" in out
    _, out, _ = command("scripts/inspect_adapter.py", f"--aligner_path={longer}", aligner_path=first, **arguments)
    assert "tokens: (2, 32) and (3, 32), not comparable" in out
    _, _, err = command("scripts/inspect_adapter.py", f"--aligner_path={second}", aligner_path=first)
    assert err == f"picture: {tmp_path / 'a.compared.png'}\n"
    save_adapter(tmp_path / "d.safetensors", LoRA(tiny_config()))
    status, out, err = command(
        "scripts/inspect_adapter.py", f"--aligner_path={tmp_path / 'd.safetensors'}", aligner_path=first, **arguments
    )
    assert (status, out) == (1, "")
    assert "d.safetensors is of the method 'lora'; only an Aligner can be inspected" in err
    more = [f"--aligner_path={path}" for path in (first, second)]
    status, _, err = command("scripts/inspect_adapter.py", *more, aligner_path=first, **arguments)
    assert (status, err) == (1, "error: --adapter_path was given 3 times: give one Aligner, or two to compare them\n")


def test_nearest_vocabulary_entry(command, tmp_path):
    """A token that is an embedding's multiple is nearest to that embedding."""
    model = load_base(DEMO_BASE)
    aligner = Aligner(model.config, 1)
    with torch.no_grad():
        aligner.tokens.copy_(2 * model.transformer.wte.weight[19556:19557])  # "Hello"
    save_adapter(tmp_path / "a.safetensors", aligner, model)
    paths = {"aligner_path": tmp_path / "a.safetensors", "output_path": tmp_path / "gates.png"}
    status, out, err = command("scripts/inspect_adapter.py", checkpoint_dir=DEMO_BASE, nearest=2, **paths)
    assert status == 0, err
    assert "token 0: 'Hello' 1.000, " in out
