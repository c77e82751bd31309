"""Writing: an interruption spoils nothing, two processes do not mix, and nothing is replaced that was not meant."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lit_llama.files import atomic_file, atomic_folder, remove_temporaries, shareable_path
from lit_llama.locks import check_not_owned, own_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(context):
        with context as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            raise RuntimeError

    for context in (atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder")):
        with pytest.raises(RuntimeError):
            fail(context)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def run(code, path):
    """Run Python with a path as its argument; it imports no torch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, path], env=environment).returncode


KILLED_IN_A_FOLDER = """
import os, pathlib, sys
from lit_llama.files import atomic_folder
with atomic_folder(pathlib.Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("half")
    os._exit(9)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    assert run(KILLED_IN_A_FOLDER, tmp_path / "data") == 9
    [left] = names(tmp_path)
    assert left.startswith(".data.")
    with atomic_folder(tmp_path / "data") as first:
        (first / "whole").write_text("whole")
        assert names(tmp_path) == [first.name]
        with atomic_folder(tmp_path / "data") as second:  # leaves alone what another one still writes
            (second / "whole").write_text("second")
        with pytest.raises(ValueError, match="exists"):
            atomic_folder(tmp_path / "data").__enter__()
        assert names(first) == ["whole"]
        (tmp_path / "data" / "whole").unlink()
    assert names(tmp_path) == ["data"]
    assert (tmp_path / "data" / "whole").read_text() == "whole"


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def write():
        with atomic_folder(tmp_path / "data"):
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "precious").write_text("x")

    with pytest.raises(ValueError, match="exists"):
        write()
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["precious"]


def test_temporary_files_of_killed_writes_are_removed(tmp_path):
    for name in (".a.pt.abcd_012", ".a.csv.abcd0123", ".a.pt.abc", "a.pt", ".lock"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path, r"a\.pt|b\.csv")
    assert names(tmp_path) == [".a.csv.abcd0123", ".a.pt.abc", ".lock", "a.pt"]


def test_only_a_folder_of_its_kind_is_replaced(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("x")
    for overwrite, message in ((False, "replace it with --overwrite"), (True, "it holds no kind.json")):
        with pytest.raises(ValueError, match=message), atomic_folder(tmp_path / "new", overwrite, "kind.json"):
            pass
    (tmp_path / "new" / "kind.json").write_text("{}")

    def write(fails):
        with atomic_folder(tmp_path / "new", True, "kind.json") as temporary:
            assert names(tmp_path / "new") == ["kind.json", "precious"]  # stays until the new one is complete
            (temporary / "kind.json").write_text("{}")
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write(True)
    write(False)
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["kind.json"]


def test_every_script_replaces_what_it_wrote(command, base_dir, hf_checkpoint, aligner_path, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": f"{n}", "output": "b"} for n in range(4)]))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    base = {"checkpoint_dir": base_dir}
    runs = {
        "scripts/prepare_alpaca.py": {**base, "data_path": tmp_path / "a.json"},
        "scripts/prepare_pairs.py": {**base, "data_path": tmp_path / "a.jsonl"},
        "scripts/prepare_examples.py": {**base, "questions_path": ROOT / "examples" / "questions.jsonl"},
        "scripts/convert_hf_checkpoint.py": {"checkpoint_dir": hf_checkpoint},
        "scripts/export_hf_checkpoint.py": base,
    }
    for script, options in runs.items():
        options |= {"output_dir": tmp_path / script.replace("/", "-")}
        assert command(script, **options)[0] == 0
        (options["output_dir"] / "earlier").write_text("")
        status, _, err = command(script, **options)
        assert (status, err.count("\n")) == (1, 1)
        assert "replace it with --overwrite" in err
        assert (options["output_dir"] / "earlier").exists()
        status, _, err = command(script, overwrite="true", **options)
        assert status == 0, err
        assert not (options["output_dir"] / "earlier").exists()


def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / "run"
    check_not_owned(folder)
    assert not folder.exists()
    with own_folder(folder):
        for taken in (own_folder(folder).__enter__, lambda: check_not_owned(folder)):
            with pytest.raises(ValueError, match=r"another run is writing to .*run: wait"):
                taken()
    check_not_owned(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), own_folder(tmp_path / "file"):
        pass


KILLED_WITH_A_FOLDER = """
import os, pathlib, sys
from lit_llama.locks import own_folder
with own_folder(pathlib.Path(sys.argv[1])):
    os._exit(9)
"""


def test_a_killed_owner_leaves_no_lock(tmp_path):
    assert run(KILLED_WITH_A_FOLDER, tmp_path) == 9
    with own_folder(tmp_path):
        pass


# What Python lacks on Windows: these modules, opening folders, and flushing what is open for reading.
WINDOWS = """
import os, sys
sys.modules["resource"] = sys.modules["fcntl"] = None
os_open, fsync = os.open, os.fsync
for_writing = set()

def open(path, flags, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    descriptor = os_open(path, flags, *args, **options)
    (for_writing.add if flags & (os.O_WRONLY | os.O_RDWR) else for_writing.discard)(descriptor)
    return descriptor

def flush(descriptor):
    if "lit_llama/files.py" in sys._getframe(1).f_code.co_filename and descriptor not in for_writing:
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)

os.open, os.fsync = open, flush
"""


# In one process, which imports torch and lightning once.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
"""


def test_scripts_run_without_what_windows_lacks(base_dir, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WINDOWS)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": f"{n}", "output": "b"} for n in range(4)]))
    paths = [f"--checkpoint_dir={base_dir}", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    commands = [
        ("scripts/prepare_alpaca.py", paths[0], f"--data_path={tmp_path / 'a.json'}", f"--output_dir={tmp_path}/data"),
        ("finetune/aligner.py", *paths, "--max_steps=1", "--warmup_steps=1"),
        ("generate/aligner.py", paths[0], f"--aligner_path={tmp_path}/out/aligner.safetensors", "--prompt=a"),
    ]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            ONE_AFTER_THE_OTHER,
            json.dumps([[str(ROOT / path), *more] for path, *more in commands]),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert "memory unknown" in result.stderr


def test_what_is_shared_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [shareable_path(path) for path in (tmp_path / "a" / "b", tmp_path.parent / "c", tmp_path)]
    assert found == ["a/b", "c", tmp_path.name]
