"""Number formats: what "auto" takes on a machine, what it says, and what a resumed run keeps."""

import pytest
import torch
from conftest import CPU_INSTRUCTIONS

from lit_llama.base import open_base
from lit_llama.devices import precision
from lit_llama.devices.precision import default_dtype, what_auto_takes

CPU = torch.device("cpu")
FLOAT32 = "float32, as this CPU has no instructions for bfloat16"


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with given instructions, asked as this version of torch asks."""
    monkeypatch.setattr(precision, "CPU_INSTRUCTIONS", CPU_INSTRUCTIONS)

    def has(*instructions, onednn=True):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        found = {"avx512_f": True, "avx512_bf16": False, **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)

    return has


@pytest.mark.parametrize(
    ("instructions", "name"),
    [("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX"), ("bf16", "Arm BF16"), ("sve_bf16", "Arm SVE BF16")],
)
def test_bfloat16_where_a_cpu_has_it(cpu, instructions, name):
    cpu(instructions)
    assert default_dtype(CPU) == torch.bfloat16
    assert what_auto_takes(CPU) == f"--precision auto: bfloat16, for which this CPU has instructions ({name})"


def test_float32_elsewhere(cpu):
    cpu("avx512_vnni")
    assert default_dtype(CPU) == torch.float32
    assert what_auto_takes(CPU) == f"--precision auto: {FLOAT32}"
    cpu("bf16", onednn=False)  # as on a Mac: no kernels use them
    assert default_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("machine", "has"), [("x86_64", True), ("x86_64", False), ("aarch64", True)])
def test_earlier_versions_of_torch_are_asked_as_they_can_be(cpu, monkeypatch, machine, has):
    """Before 2.11 torch has no list of capabilities."""
    cpu()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr("platform.machine", lambda: machine)
    if machine == "x86_64":
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert default_dtype(CPU) == (torch.bfloat16 if has else torch.float32)
    if machine == "x86_64":
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        assert default_dtype(CPU) == torch.float32


def test_a_resumed_run_keeps_its_format(cpu, command, base_dir, data_dir, tmp_path):
    """As on a machine with other instructions, or with a state of a version that took float32 on each CPU."""
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path, "warmup_steps": 1}
    options |= {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "eval_interval": 2}
    cpu("avx512_bf16")
    status, _, err = command("finetune/aligner.py", **options)
    assert (status, err.count("--precision auto: bfloat16, for which this CPU has instructions")) == (0, 1)
    cpu()
    status, _, err = command("finetune/aligner.py", **{**options, "resume": "true"})
    assert (status, err.count("--precision auto: bf16-true, as before the run was resumed")) == (0, 1)
    status, _, err = command("finetune/aligner.py", **{**options, "resume": "true", "precision": "32-true"})
    assert status == 1
    assert "precision was torch.bfloat16, is torch.float32" in err
    other = {**options, "out_dir": tmp_path / "other", "resume": "true"}
    assert f"--precision auto: {FLOAT32}" in command("finetune/aligner.py", **other)[2]


def test_scripts_say_what_auto_takes(cpu, command, base_dir):
    cpu("amx_bf16")
    options = {"checkpoint_dir": base_dir, "prompt": "Hi", "max_new_tokens": 2}
    status, out, err = command("generate/base.py", **options)
    assert status == 0
    assert "--precision" not in out
    assert err.count("--precision auto: bfloat16, for which this CPU has instructions (AMX)") == 1
    assert "--precision" not in command("generate/base.py", **options, precision="32-true")[2]
    assert open_base(base_dir).model.dtype == torch.bfloat16
