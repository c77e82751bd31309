"""This project's models in EleutherAI's Language Model Evaluation Harness (lm_eval): its tasks, prompts and scores.

What the harness asks of a model are log-likelihoods and greedy continuations, of strings; `HarnessModel` answers as the
harness's own `hf` model does. `run_tasks` evaluates the tasks that `lit_llama.evaluation.tasks` loads.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval
import torch
import torch.distributed as dist
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.chat_template import render_chat
from lit_llama.combine import OnPrompt
from lit_llama.decoder import GenerationRequest
from lit_llama.evaluation.tasks import all_tasks, task_manager
from lit_llama.files import atomic_file
from lit_llama.generation import complete
from lit_llama.prompts import chat_switch

SHARED = 32  # tokens: inputs that begin with as many equal ones are batched together, their common start is read once
MOST_LOGITS = 4096  # positions of a batch whose logits are kept: 128,000 tokens in float32 make 2 GB


class HarnessModel(TemplateLM):
    """A base model, perhaps with an adapter, as the harness sees it.

    Processes that torch.distributed has brought together share the requests.

    Args:
        base: the model.
        batch_size: number of requests computed at once.
        max_gen_toks: length of a continuation in tokens, if the task does not say.

    Attributes:
        name: tells the model, its weights and their number format from others.
    """

    def __init__(self, base: Base, batch_size: int = 16, max_gen_toks: int = 256) -> None:
        super().__init__()
        self.model, self._tokenizer, self.adapter = base.model, base.tokenizer, base.adapter
        self._switch = chat_switch(base.style.name, base.tokenizer)
        self.name = f"{base.name}, {base.weights}"
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.max_length = base.model.config.block_size
        self._device = base.device
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
        adapter = self.adapter
        if adapter is not None:
            adapter = OnPrompt(adapter, (at <= end - torch.tensor(needed)[:, None]).to(self.device))
        logits = self.model(ids.to(self.device), adapter, logits_at=wanted.to(self.device), **options)
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
            generator = torch.Generator().manual_seed(i)
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
        """Messages in the model's own chat format, told to think or not as the model's prompt style says.

        Raises:
            ValueError: it has none, or the last message is to be continued.
        """
        if not add_generation_prompt:
            raise ValueError("this task has the model continue its own message, which this model class cannot: leave "
                             "out --chat_template")  # fmt: skip
        return render_chat(self._tokenizer, chat_history, **self._switch)

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


def run_tasks(
    lm: HarnessModel,
    tasks: Sequence[Task | Group],
    out_dir: Path,
    *,
    limit: int | None = None,
    questions: dict[str, list[int]] | None = None,
    chat_template: bool = False,
    counts: str | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model, and write the harness's results and every answer to files.

    Every answer is kept in `out_dir/answers*.db` as soon as it is there; another call with the same model goes on.

    Args:
        lm: the model.
        tasks: what to evaluate.
        out_dir: gets `results.json` and `samples.jsonl`.
        limit: the first questions of each task alone.
        questions: or numbers of the questions of each task.
        chat_template: put prompts in the model's chat format, examples as turns.
        counts: the metric that counts, with its filter where there are several, to be recorded.

    Returns:
        What the harness's `simple_evaluate` does: None in processes other than the first.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(lm.name.encode()).hexdigest()[:12]
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
        task_manager=task_manager(),
    )
    if results is None:
        return None
    samples = results.pop("samples")
    results["config"] |= {"model_name": lm.name, "metric_that_counts": counts}
    with atomic_file(out_dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    with atomic_file(out_dir / "samples.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                text = json.dumps({"task": task, **row}, default=handle_non_serializable, ensure_ascii=False)
                file.write(text + "\n")
    return {**results, "samples": samples}
