"""Reading and writing files so that an interruption leaves the old file good and an error names the place."""

import gzip
import importlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from lit_llama.locks import locked_folder

MOST_SETTINGS = 2**25  # bytes of a JSON file that is read as a whole
MOST_NESTED = 100  # lists and objects in each other; real files have a tenth of that
_RANDOM = "[a-z0-9_]{8}"  # what `tempfile` puts into a name


def require_extra(module: str, extra: str) -> ModuleType:
    """Import a module that only an optional dependency brings.

    Args:
        module: its name.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}: pip install -e '.[{extra}]'") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success flush what was written there and rename it to `path`.

    On an error the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _plain_os_errors():
            yield temporary
        _flush(temporary, 0o666)
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _plain_os_errors() -> Iterator[None]:
    """Turn what safetensors raises where it cannot write, on a full disk for one, into the `OSError` that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"writing failed: {error}") from None


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False, known_by: str = "") -> Iterator[Path]:
    """Give a temporary folder next to `path`; on success flush its files and rename it to `path`.

    The temporary folder of a process that was killed while it wrote is removed by the next one that writes to `path`.

    Args:
        path: the folder to write.
        overwrite: replace a folder of this kind; it stays until the new one is complete.
        known_by: see `check_new_folder`.

    Raises:
        ValueError: `path` may not be written.
    """
    check_new_folder(path, overwrite, known_by)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    earlier = temporary.with_name(f"{temporary.name}.old")
    try:
        with locked_folder(temporary), _plain_os_errors():
            yield temporary
            for file in temporary.rglob("*"):
                _flush_folder(file) if file.is_dir() else _flush(file, 0o666)
        temporary.chmod(0o777 & ~_umask())
        check_new_folder(path, overwrite, known_by)  # another process may have written it since
        replaced = path.exists()
        if replaced:
            path.replace(earlier)
        try:
            temporary.replace(path)
        except OSError:
            if replaced:
                earlier.replace(path)
            raise
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def check_new_folder(path: Path, overwrite: bool = False, known_by: str = "") -> None:
    """Make sure that a folder can be written without losing anything that is still wanted.

    Args:
        path: the folder.
        overwrite: a folder of the same kind may be replaced.
        known_by: the file by which one knows a folder of that kind, so that no other folder is ever replaced.

    Raises:
        ValueError: `path` exists, is not empty, and may not be replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{path} exists: choose another folder to write to, remove it, or replace it with --overwrite")
    if not (path / known_by).is_file() or path.is_symlink():
        raise ValueError(
            f"{path} exists and is not replaced, because it holds no {known_by}, so it is not a folder of the kind "
            "that is written here: choose another folder to write to"
        )


def _remove_abandoned(path: Path) -> None:
    """Remove temporary folders of `path` that no process is writing any more."""
    for folder in path.parent.iterdir():
        if folder.is_dir() and re.fullmatch(rf"\.{re.escape(path.name)}\.{_RANDOM}(\.old)?", folder.name):
            with locked_folder(folder) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: Path, names: str) -> None:
    """Remove the temporary files that killed writers left in a folder which nobody else writes to.

    Args:
        folder: where `atomic_file` wrote.
        names: pattern of the names of the files that it wrote.
    """
    for path in folder.iterdir():
        if path.is_file() and re.fullmatch(rf"\.({names})\.{_RANDOM}", path.name):
            path.unlink()


def shareable_path(path: Path) -> str:
    """A path as it is recorded in what people share: without the folders of this machine.

    Args:
        path: a file or folder.

    Returns:
        The path from the working directory if it lies there, a relative path as it is, otherwise the last component.
    """
    if not path.is_absolute():
        return path.as_posix()
    inside = path.is_relative_to(Path.cwd()) and path != Path.cwd()
    return path.relative_to(Path.cwd()).as_posix() if inside else path.name


def _flush(path: Path, mode: int) -> None:
    """Wait until a file is on the disk, and give it the mode that others have: it was created as private."""
    descriptor = os.open(path, os.O_RDWR)  # Windows flushes nothing that is open for reading alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.chmod(mode & ~_umask())


def _flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system has a way to."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do some network file systems flush them
        pass
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_file(path: Path) -> None:
    """Make sure that there is a file to read.

    Raises:
        FileNotFoundError: there is none, or a folder of that name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, expected a file" if path.is_dir() else f"{path}: no such file")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked if its name ends in `.gz`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, and the message names the line; or it cannot be unpacked.
    """
    check_file(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file ({error})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file of settings, which is small and not deeply nested.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, and the message names the line; or it is too large or too deeply nested.
    """
    check_file(path)
    if path.stat().st_size > MOST_SETTINGS:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, expected a file of settings of at most {MOST_SETTINGS}"
        )
    return parse_json(read_text(path), path)


def parse_json(text: str, place: object) -> Any:
    """The value that JSON text holds.

    Args:
        text: from a file that anybody may have written.
        place: the file, for error messages.

    Raises:
        ValueError: it is not JSON, and the message names the line; or it is too deeply nested, or a number too long.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError:  # Python reads no whole number of more than 4300 digits
        raise ValueError(f"{place}: a number has too many digits") from None
    level = [value]
    for _ in range(MOST_NESTED):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise _too_deep(place)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep(place: object) -> ValueError:
    return ValueError(f"{place}: lists and objects are nested more than {MOST_NESTED} deep")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
