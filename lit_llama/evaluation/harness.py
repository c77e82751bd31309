"""This project's models in EleutherAI's Language Model Evaluation Harness (lm_eval): its tasks, prompts and scores.

What the harness asks of a model are log-likelihoods and greedy continuations, of strings; `HarnessModel` answers as the
harness's own `hf` model does. `run_tasks` evaluates, with the hub's data or with files.
"""

import functools
import hashlib
import json
import random
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import datasets.config
import huggingface_hub
import huggingface_hub.errors
import lm_eval
import torch
import torch.distributed as dist
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lit_llama.chat_template import render_chat
from lit_llama.decoder import GenerationRequest
from lit_llama.files import atomic_file
from lit_llama.generation import complete
from lit_llama.model import LLaMA
from lit_llama.records import read_csv, read_records
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

SHARED = 32  # tokens: inputs that begin with as many equal ones are batched together, their common start is read once
MOST_LOGITS = 4096  # positions of a batch whose logits are kept: 128,000 tokens in float32 make 2 GB


class HarnessModel(TemplateLM):
    """A base model, perhaps with an adapter, as the harness sees it.

    Processes that torch.distributed has brought together share the requests.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        adapter: beside the base model, if any.
        batch_size: requests at once.
        max_gen_toks: of a continuation, if the task does not say.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        adapter: Adapter | None = None,
        batch_size: int = 16,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self.adapter = model, tokenizer, adapter
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.max_length = model.config.block_size
        self._device = model.device
        if dist.is_available() and dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; where the model wants one, a beginning-of-sequence token unless the text has it."""
        bos = self._tokenizer.adds_bos and add_special_tokens is not False
        if add_special_tokens is None and bos:
            bos = not string.startswith(self._tokenizer.special_tokens["bos_token"])
        return self._tokenizer.encode(string, bos=bos)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows; of a long one's tokens each is counted once."""
        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in found]
            windows += parts
            counts.append(len(parts))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))  # type: ignore[arg-type]
        totals = [sum(next(parts)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(  # type: ignore[override]
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **more: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Equal inputs, as a question's one-token choices have, are computed once.
        """
        askers: dict[tuple[int, ...], list[int]] = {}  # input: requests that need logits after it
        for i, (_, context, continuation) in enumerate(requests):
            askers.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        needed = {ids: max(len(requests[i][2]) for i in asking) for ids, asking in askers.items()}
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or self.rank > 0, leave=False)
        for batch in _batches(needed, self.batch_size):
            for ids, logits in zip(batch, self._logits(batch, [needed[ids] for ids in batch]), strict=True):
                logs = logits.float().log_softmax(-1)  # (n, V)
                for i in askers[ids]:
                    text, _, continuation = requests[i]
                    target = torch.tensor(continuation, device=logs.device)
                    rows = logs[-len(continuation) :]
                    answers[i] = (
                        float(rows.gather(1, target[:, None]).sum()),
                        bool((rows.argmax(-1) == target).all()),
                    )
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[i])
                bar.update(len(askers[ids]))
        bar.close()
        return answers

    @torch.no_grad()
    def _logits(self, batch: Sequence[tuple[int, ...]], needed: Sequence[int]) -> Sequence[Tensor]:
        """The logits (n, V) of the last `needed` positions of each row; a start that all share is computed once."""
        shared = min(_shared(batch), *(len(ids) - n for ids, n in zip(batch, needed, strict=True)))
        if len(batch) == 1 or shared < SHARED:
            shared = 0
        rest = [torch.tensor(ids[shared:]) for ids in batch]
        ids = pad_sequence(rest, batch_first=True)  # (B, T)
        end = torch.tensor([len(row) for row in rest])[:, None]
        at = torch.arange(ids.size(1))  # (T)
        wanted = (at < end) & (at >= end - torch.tensor(needed)[:, None])  # (B, T)
        options: dict[str, Any] = {}
        if shared:
            start = self.model.new_cache(1, shared)
            nothing = torch.zeros(1, shared, dtype=torch.bool, device=self.device)
            self.model(
                torch.tensor([batch[0][:shared]], device=self.device), self.adapter, cache=start, logits_at=nothing
            )
            cache = self.model.new_cache(len(batch), shared + ids.size(1))
            for layer, read in zip(cache.layers, start.layers, strict=True):
                layer.prefill(read.k.expand(len(batch), -1, -1, -1), read.v.expand(len(batch), -1, -1, -1))
            options = {"cache": cache, "positions": (shared + at).expand(ids.shape).to(self.device)}
        logits = self.model(ids.to(self.device), self.adapter, logits_at=wanted.to(self.device), **options)
        return logits.split(list(needed))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context to a stop string, the end of the text or the greatest length."""
        asked: list[tuple[GenerationRequest, list[str]]] = []
        for i, request in enumerate(requests):
            context, given = cast(tuple[str, dict[str, Any]], request.args)
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(options["until"], eos=None)
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"{options['max_gen_toks']} tokens are to be generated, the model's window is {self.max_length}"
                )
            ids = self.tok_encode(context)[-room:]
            sampling = {key: options[key] for key in ("temperature", "top_k", "top_p") if key in options}
            generator = torch.Generator(self.device).manual_seed(i)
            stop_ids = self._tokenizer.stop_ids
            asked.append(
                (
                    GenerationRequest(
                        ids, self.adapter, options["max_gen_toks"], stop_ids, generator=generator, **sampling
                    ),
                    until,
                )
            )
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0].prompt) - asked[i][0].max_new_tokens)

        def stops(number: int, ids: list[int]) -> bool:
            text = self._tokenizer.decode(ids)
            return any(stop in text for stop in asked[order[number]][1])

        texts = [""] * len(requests)
        rows = complete(self.model, [asked[i][0] for i in order], self.batch_size, stops)
        bar = tqdm(rows, total=len(order), desc="generations", disable=disable_tqdm or self.rank > 0, leave=False)
        for i, ids in zip(order, bar, strict=True):
            texts[i] = postprocess_generated_text(self._tokenizer.decode(ids), asked[i][1], None)
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages in the model's own chat format.

        Raises:
            ValueError: it has none, or the last message is to be continued.
        """
        if not add_generation_prompt:
            raise ValueError("this task has the model continue its own message, which this model class cannot: leave "
                             "out --chat_template")  # fmt: skip
        return render_chat(self._tokenizer, chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source of the chat format."""
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart."""
        return self._tokenizer.fingerprint

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One number of each process."""
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor)
        return torch.stack(found).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """One object of each process, at one of them."""
        found = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst)
        return found

    def barrier(self) -> None:
        """Wait for the others."""
        dist.barrier()


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens at their start all rows have in common."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _batches(needed: dict[tuple[int, ...], int], batch_size: int) -> Iterator[list[tuple[int, ...]]]:
    """Inputs that begin alike together, then those of like length, the longest first."""
    starts = Counter(ids[:SHARED] for ids in needed)
    order = sorted(needed, key=lambda ids: (ids[:SHARED] if starts[ids[:SHARED]] > 1 else (), -len(ids)))
    batch: list[tuple[int, ...]] = []
    for ids in order:
        another_start = batch and starts[ids[:SHARED]] > 1 and batch[0][:SHARED] != ids[:SHARED]
        logits = sum(needed[row] for row in [*batch, ids])
        if batch and (len(batch) == batch_size or another_start or logits > MOST_LOGITS):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


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
        (target / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        configs.setdefault(config, []).append({"split": split, "path": file})
    # The hub's way of naming the files of a dataset; JSON is YAML.
    card = {"configs": [{"config_name": config, "data_files": files} for config, files in configs.items()]}
    (target / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    return target


@functools.cache
def _manager() -> TaskManager:
    return TaskManager()  # reads thousands of files


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
    manager = _manager()
    known = set(manager.all_tasks)
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
            dataset = "mmlu" if name.startswith("mmlu") else "gsm8k" if name.startswith("gsm8k") else None
            if dataset is None:
                raise ValueError(f"--tasks {name}: --data_dir has copies of {' and '.join(LOCAL)} alone")
            fields["dataset_path"] = str(local_copy(dataset, data_dir, work_dir))
            fields["dataset_kwargs"] = {"cache_dir": str(work_dir / "cache")}
        try:
            if isinstance(task, dict):
                found: Any = list(manager.load([{**task, **fields}])["tasks"].values())
            else:  # `manager.load` has no way to change all tasks of a group
                found = manager._factory.build(manager._index[name], overrides=fields, registry=manager._index)
        except (ConnectionError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
            copies = ": give --data_dir, a folder of copies, which howto/evaluate.md describes"
            raise ValueError(
                f"the Hugging Face hub cannot be reached, and its cache on this machine lacks the data of {name}"
                + (copies if name.startswith(tuple(LOCAL)) else "")
            ) from error
        loaded += found if isinstance(found, list) else [found]
    return loaded


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


def run_tasks(
    lm: HarnessModel,
    tasks: Sequence[Task | Group],
    out_dir: Path,
    *,
    name: str,
    limit: int | None = None,
    questions: dict[str, list[int]] | None = None,
    chat_template: bool = False,
    counts: str | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model, and write the harness's results and every answer to files.

    Every answer is kept in `out_dir/answers*.db` as soon as it is there; another call with the same name goes on.

    Args:
        lm: the model.
        tasks: what to evaluate.
        out_dir: gets `results.json` and `samples.jsonl`.
        name: of the model with its weights: answers of another one are not used.
        limit: the first questions of each task alone.
        questions: or numbers of the questions of each task.
        chat_template: put prompts in the model's chat format, examples as turns.
        counts: the metric that counts, with its filter where there are several, to be recorded.

    Returns:
        What the harness's `simple_evaluate` does: None in processes other than the first.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    if questions is not None:  # the harness would evaluate others whole
        tasks = [task for task in all_tasks(tasks) if task.task_name in questions]
    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its arguments
    results = simple_evaluate(
        lm,
        tasks=list(tasks),
        limit=limit,
        samples=questions,
        use_cache=str(out_dir / f"answers-{digest}"),
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        bootstrap_iters=1000,
    )
    if results is None:
        return None
    samples = results.pop("samples")
    results["config"] |= {"model_name": name, "metric_that_counts": counts}
    with atomic_file(out_dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    with atomic_file(out_dir / "samples.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                text = json.dumps({"task": task, **row}, default=handle_non_serializable, ensure_ascii=False)
                file.write(text + "\n")
    return {**results, "samples": samples}
