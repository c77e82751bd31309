"""The tasks of EleutherAI's Language Model Evaluation Harness (lm_eval), with the hub's data or with local copies."""

import functools
import json
import random
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.config
import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from lit_llama.files import atomic_file
from lit_llama.records import read_csv, read_records


class Split(NamedTuple):
    """A file of a local copy of a dataset."""

    config: str
    split: str
    rows: list[dict[str, Any]]


def read_mmlu(folder: Path) -> Iterator[Split]:
    """The files `SPLIT/SUBJECT_SPLIT.csv` of MMLU as rows of the hub's `cais/mmlu`.

    Raises:
        FileNotFoundError: a split is missing.
        ValueError: a file lacks a column, or an answer is none of the choices.
    """
    columns = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    for split in ("dev", "test"):
        files = sorted((folder / split).glob(f"*_{split}.csv"))
        if not files:
            raise FileNotFoundError(f"{folder / split} holds no SUBJECT_{split}.csv")
        for file in files:
            rows = []
            for place, row in read_csv(file, columns):
                answer = row["answer"].strip().upper()
                answer = str("ABCD".index(answer)) if answer and answer in "ABCD" else answer
                if answer not in ("0", "1", "2", "3"):
                    raise ValueError(f"{place}: the answer is {row['answer']!r}, expected 0 to 3 or A to D")
                choices = [row[f"choice{i}"] for i in range(4)]
                rows.append({"question": row["question"], "choices": choices, "answer": int(answer)})
            yield Split(file.stem.removesuffix(f"_{split}"), split, rows)


def read_gsm8k(folder: Path) -> Iterator[Split]:
    """The files `train.jsonl` and `test.jsonl` of GSM8K as rows of the hub's `openai/gsm8k`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row lacks its question or answer.
    """
    for split in ("train", "test"):
        rows = []
        for place, row in read_records(folder / f"{split}.jsonl"):
            if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
                raise ValueError(f"{place}: expected 'question', and 'answer' with '####', found {sorted(row)}")
            rows.append({"question": row["question"], "answer": row["answer"]})
        yield Split("main", split, rows)


LOCAL = {"mmlu": read_mmlu, "gsm8k": read_gsm8k}


def local_copy(name: str, data_dir: Path, folder: Path) -> Path:
    """Write a dataset that is at hand as files in the layout of the hub, which the harness's tasks expect.

    Args:
        name: one of `LOCAL`.
        data_dir: holds the files, or a folder of that name that does.
        folder: to write to.

    Returns:
        A folder to be used as `dataset_path`.
    """
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    configs: dict[str, list[dict[str, str]]] = {}
    for config, split, rows in LOCAL[name](data_dir / name if (data_dir / name).is_dir() else data_dir):
        file = f"{config}_{split}.jsonl"
        with atomic_file(target / file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        configs.setdefault(config, []).append({"split": split, "path": file})
    # The hub's way of naming the files of a dataset; JSON is YAML.
    card = {"configs": [{"config_name": config, "data_files": files} for config, files in configs.items()]}
    with atomic_file(target / "README.md") as temporary:
        temporary.write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    return target


@functools.cache
def task_manager() -> TaskManager:
    """The harness's index of its tasks, made once: it reads thousands of files, which takes seconds."""
    return TaskManager()


def load_tasks(
    tasks: Sequence[str | dict[str, Any]], data_dir: Path | None, work_dir: Path, **overrides: Any
) -> list[Task | Group]:
    """Tasks of the harness, by their names there, or of our own.

    Args:
        tasks: names of tasks, groups or tags, or configurations in the harness's format.
        data_dir: folder of local copies of the data, see `LOCAL`; if None, the hub's are used.
        work_dir: where local copies are laid out as the tasks expect them.
        overrides: fields of the tasks' configurations, such as `num_fewshot`.

    Raises:
        ValueError: there is no such task, or its data is not at hand.
    """
    known = set(task_manager().all_tasks)
    for name in tasks:
        if isinstance(name, str) and name not in known:
            near = [other for other in sorted(known) if other.startswith(name.split("_")[0])][:8]
            raise ValueError(f"--tasks {name}: the harness has no such task; near: {', '.join(near) or 'none'}")
    if data_dir is not None:
        datasets.disable_progress_bars()  # two for each of MMLU's 57 subjects
    elif not _hub_answers():  # what its cache has is used; without this, minutes of retries come first
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    loaded: list[Task | Group] = []
    for task in tasks:
        name = task if isinstance(task, str) else task["task"]
        fields = dict(overrides)
        if data_dir is not None:
            dataset = next((known for known in LOCAL if name.startswith(known)), None)
            if dataset is None:
                raise ValueError(f"--tasks {name}: --data_dir has copies of {' and '.join(LOCAL)} alone")
            fields["dataset_path"] = str(local_copy(dataset, data_dir, work_dir))
            fields["dataset_kwargs"] = {"cache_dir": str(work_dir / "cache")}
        try:
            loaded += _load(task, fields)
        except (ConnectionError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
            copies = ": give --data_dir, a folder of copies, which howto/evaluate.md describes"
            raise ValueError(
                f"the Hugging Face hub cannot be reached, and its cache on this machine lacks the data of {name}"
                + (copies if name.startswith(tuple(LOCAL)) else "")
            ) from error
    return loaded


def _load(task: str | dict[str, Any], fields: dict[str, Any]) -> list[Task | Group]:
    """A task, group or tag of the harness, or a task of our own, with some fields of its configuration changed."""
    manager = task_manager()
    if isinstance(task, dict):
        return list(manager.load([{**task, **fields}])["tasks"].values())
    # `manager.load` has no way to change all tasks of a group
    found: Any = manager._factory.build(manager._index[task], overrides=fields, registry=manager._index)
    return found if isinstance(found, list) else [found]


def _hub_answers(seconds: float = 5.0) -> bool:
    """Whether the Hugging Face hub, or what stands for it, says anything within that time."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # the hub's own client may know better
    return True


def random_questions(tasks: Sequence[Task | Group], n: int, seed: int) -> dict[str, list[int]]:
    """Numbers of `n` questions drawn from all tasks together, those of each task in order.

    Raises:
        ValueError: there are fewer.
    """
    every: list[tuple[str, int]] = []
    for task in all_tasks(tasks):
        every += [(task.task_name, i) for i in range(len(task.eval_docs))]
    if not 0 < n <= len(every):
        raise ValueError(f"--questions {n}: there are {len(every)}")
    chosen: dict[str, list[int]] = {}
    for name, i in sorted(random.Random(seed).sample(every, n)):
        chosen.setdefault(name, []).append(i)
    return chosen


def all_tasks(tasks: Sequence[Task | Group]) -> list[Task]:
    """The tasks themselves, those of groups included."""
    return [one for task in tasks for one in (task.get_all_tasks() if isinstance(task, Group) else [task])]
