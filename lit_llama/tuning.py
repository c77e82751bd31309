"""Tuning in one call: an adapter on a list of prompts and responses, and a learning rate for data of one's own.

base = open_base("checkpoints/SmolLM2-135M-Instruct")
aligner = Aligner(base.model.config)
train(base, aligner, [("Who are you?", "Captain Salt, at your service!"), ...])
base.with_adapter(aligner).generate("What is rain?")
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.optim import AdamW, Optimizer

from lit_llama.adapters import AnyAdapter
from lit_llama.base import Base
from lit_llama.data import Batch, TokenDataset
from lit_llama.data_writing import hold_out, write_dataset
from lit_llama.losses import SUPERVISED_METRICS, LossSums, supervised_loss
from lit_llama.model import LLaMA
from lit_llama.plan import LEARNING_RATES, Decay, Plan
from lit_llama.prompts import Message
from lit_llama.runs import Run, RunFolder
from lit_llama.samples import sample_answers
from lit_llama.seam import Adapter
from lit_llama.states import recorded_setting
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import LookAhead, Loss, Say, fit, write_line

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1e0]
SPLITS = "train", "validation"
MOST_KEPT_APART = 256  # items that tell learning rates apart
FEWEST_HELD_OUT = 2  # below that, validation measures the training pairs

Prompt = str | Sequence[Message]


def train(
    base: Base,
    adapter: AnyAdapter,
    pairs: Sequence[tuple[Prompt, str]],
    *,
    learning_rate: float | Literal["auto"] | None = None,
    decay: Decay = "linear",
    weight_decay: float = 0.02,
    epochs: int = 2,
    steps: int | None = None,
    warmup_steps: int | None = None,
    batch_size: int = 4,
    patience: int | None = None,
    eval_interval: int = 48,
    validation_share: float = 0.1,
    max_seq_length: int = 512,
    seed: int = 1337,
    out_dir: Path | str | None = None,
    loss: Callable[[LLaMA, Adapter | None, Batch], LossSums] = supervised_loss,
    measured: Mapping[str, str] = SUPERVISED_METRICS,
) -> dict[str, float]:
    """Train an adapter on prompts and responses, on the device that the base model is on.

    The prompts become text by `base.style`; the responses are learned together with the token that ends them. The
    defaults are those of the demo.

    Args:
        base: the base model, which stays as it is, without an adapter or with the one that is trained.
        adapter: what is trained. It ends with the values of the lowest validation loss.
        pairs: what a user says, as a text or as the messages of a conversation so far, and what is answered.
        learning_rate: peak, or "auto" to try a few on a part of the training pairs; if not given, that of the method,
            see `lit_llama.plan.LEARNING_RATES`.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: weight decay of AdamW.
        epochs: how often every pair is read, unless `steps` is given.
        steps: optimizer steps.
        warmup_steps: optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a shorter run.
        batch_size: pairs per optimizer step.
        patience: number of validations in a row without a lower loss after which training ends.
        eval_interval: optimizer steps between validations.
        validation_share: share of the pairs that is held out for validation, drawn at random. If that is fewer than 2
            pairs, validation measures the training pairs.
        max_seq_length: longer examples are cut at this number of tokens.
        seed: seed of the draw and of the order of pairs.
        out_dir: folder for all that a script of finetune/ writes; if not given, nothing is written.
        loss: what is minimised, by the base model with the adapter, over a batch.
        measured: what the loss measures, with the label of its axis in the picture.

    Returns:
        What validation measured at its best; the "loss" is in nats per token of the held-out responses.

    Raises:
        ValueError: an option is out of range, or there is nothing to train on, or `base` has another adapter.
        FloatingPointError: training diverged.
    """
    if base.adapter is not None and base.adapter is not adapter:
        raise ValueError(
            f"{base.name}: the base has an adapter that would take no part in training; give base.with_adapter(None), "
            "or train on top of that adapter by a script of finetune/ with --also_adapter"
        )
    from lightning_fabric import Fabric  # takes seconds, which --help should not cost

    plan = Plan(
        learning_rate=learning_rate,
        decay=decay,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        epochs=epochs,
        max_steps=steps,
        warmup_steps=warmup_steps,
        eval_interval=eval_interval,
        patience=patience,
        seed=seed,
    )
    device = base.device
    fabric = Fabric(accelerator=device.type, devices=1 if device.type == "cpu" else [device.index or 0])
    optimizer = AdamW(adapter.to(device).parameters(), weight_decay=weight_decay)

    def batch_loss(batch: Batch) -> LossSums:
        return loss(base.model, adapter, batch)

    def show_answers() -> str:
        return sample_answers(base.model, adapter, base.tokenizer, base.style, held_out)

    with tempfile.TemporaryDirectory() as folder:
        _write_pairs(Path(folder) / "data", base, pairs, validation_share, max_seq_length, seed)
        data, held_out = (TokenDataset(Path(folder) / "data", split, base.tokenizer) for split in SPLITS)
        plan = find_learning_rate(
            fabric, adapter, optimizer, batch_loss, data, base.tokenizer, plan.for_items(len(data)), measured=measured
        )
        options = asdict(plan) | {"weight_decay": weight_decay, "out_dir": out_dir}
        run = Run() if out_dir is None else RunFolder(Path(out_dir), base.model, base.style.name, options)
        progress = fit(
            fabric, adapter, optimizer, batch_loss, data, held_out, plan, run,
            measured=measured, show_answers=show_answers,
        )  # fmt: skip
    run.restore_best(adapter)
    adapter.eval()
    return progress.best


def _write_pairs(
    folder: Path, base: Base, pairs: Sequence[tuple[Prompt, str]], share: float, max_seq_length: int, seed: int
) -> None:
    """Write prompts and responses as a tokenised data set, with a share of them drawn for validation.

    Raises:
        ValueError: there are no pairs, or one of them has an empty prompt or response.
    """
    if not pairs:
        raise ValueError("there is nothing to train on: pairs is empty")
    items = []
    for i, (prompt, response) in enumerate(pairs):
        if not prompt or not response.strip():
            raise ValueError(f"pairs[{i}] has an empty {'response' if prompt else 'prompt'}")
        before = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        items.append([[*before, Message("assistant", response)]])
    count = round(share * len(items))
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    held_out, learned = (order[:count], order[count:]) if count >= FEWEST_HELD_OUT else (order, order)
    chosen = [("train", items[i]) for i in sorted(learned)] + [("validation", items[i]) for i in sorted(held_out)]
    source = "pairs given in Python"
    options = {"scored_turns": "last", "total": len(chosen)}
    write_dataset(folder, chosen, base.tokenizer, base.style, max_seq_length, "truncate", source, **options)


def find_learning_rate(
    fabric: Fabric,
    adapter: AnyAdapter,
    optimizer: Optimizer,
    loss: Loss,
    train: TokenDataset,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    rates: Mapping[str, float] = LEARNING_RATES,
    share: float = 0.15,
    measured: Mapping[str, str] = SUPERVISED_METRICS,
    look_ahead: LookAhead | None = None,
    resume_dir: Path | None = None,
    say: Say = write_line,
) -> Plan:
    """Settle a learning rate that is left open: a plan with a number is given back as it is.

    None becomes the rate of the adapter's method. For "auto", each rate is tried for a quarter of the run, from 10 to
    60 steps, on the training data alone, a share of which is kept apart to measure the loss on. It begins with three
    rates; while the largest or smallest one is the best, the next one beyond is tried. Adapter, optimizer and random
    numbers are left as they were.

    Args:
        fabric: the processes of the run, which share the work.
        adapter: what is to be trained.
        optimizer: over its parameters.
        loss: loss of a batch, by the base model with the adapter.
        train: the training data.
        tokenizer: the one that they were made with.
        plan: plan of the run, with its number of steps.
        rates: by method, what None becomes and what "auto" begins around; a method that is not there has the rate of
            an Aligner.
        share: share of the training data that is kept apart, of which no more than 256 items are needed.
        measured: what the loss measures.
        look_ahead: is given all micro batches of a step before the loss is, see `fit`.
        resume_dir: folder of a run that is resumed, whose rate is taken if it has saved a state.
        say: takes what there is to tell, a line at a time.

    Returns:
        The plan with its learning rate.

    Raises:
        ValueError: there are too few training data, or training diverged at each rate.
    """
    around = rates.get(adapter.method, rates["aligner"])
    if plan.learning_rate != "auto":
        return plan if plan.learning_rate is not None else replace(plan, learning_rate=around)
    say = say if fabric.is_global_zero else lambda text: None
    if resume_dir is not None and (earlier := recorded_setting(resume_dir, "--learning_rate")) is not None:
        say(f"--learning_rate auto: {earlier:g}, as before the run was resumed")
        return replace(plan, learning_rate=earlier)
    steps = min(plan.steps, max(10, min(plan.steps // 4, 60)))
    start = copy.deepcopy((adapter.state_dict(), optimizer.state_dict()))

    def measure(rate: float) -> float:
        trial = replace(
            plan, learning_rate=rate, max_steps=steps, warmup_steps=steps // 10, eval_interval=steps, patience=None
        )
        run = Run(f"learning rate {rate:g}")
        try:
            return fit(
                fabric, adapter, optimizer, loss, learned, kept_apart, trial, run,
                measured=measured, look_ahead=look_ahead, validate_first=False, say=lambda text: None,
            ).best["loss"]  # fmt: skip
        except FloatingPointError:  # it diverged
            return math.inf
        finally:
            adapter.load_state_dict(start[0])
            optimizer.load_state_dict(copy.deepcopy(start[1]))

    middle = min(range(1, len(RATES) - 1), key=lambda i: abs(math.log(RATES[i] / around)))
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        hold_out(train, tokenizer, Path(folder) / "data", min(share, MOST_KEPT_APART / len(train)))
        kind = train.header["kind"]
        learned, kept_apart = (TokenDataset(Path(folder) / "data", split, tokenizer, kind=kind) for split in SPLITS)
        losses = search_rates(measure, RATES[middle - 1 : middle + 2])
    best = min(losses, key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise ValueError(
            f"--learning_rate auto: training diverged at each of {', '.join(f'{rate:g}' for rate in losses)}"
        )
    say(_table(losses, best, steps, len(kept_apart)))
    return replace(plan, learning_rate=best)


def _table(losses: Mapping[float, float], best: float, steps: int, items: int) -> str:
    """What was tried, in lines for people."""
    lines = [f"learning rate  loss after {steps} steps, on {items} training items kept apart"]
    for rate, loss in losses.items():
        shown = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
        lines.append(f"{rate:13g}  {shown}{'  the lowest' if rate == best else ''}")
    rates = list(losses)
    inside = best not in (rates[0], rates[-1])
    why = "its neighbours are worse" if inside else "it is the last one of those that can be tried"
    return "\n".join([*lines, f"--learning_rate auto takes {best:g}: {why}"])


def search_rates(
    measure: Callable[[float], float], first: Sequence[float], rates: Sequence[float] = RATES
) -> dict[float, float]:
    """Try learning rates: the first ones, then one beyond for as long as the largest or smallest is the best.

    Args:
        measure: gives the loss with a rate.
        first: neighbours in `rates`, to begin with.
        rates: all that may be tried, from the smallest.

    Returns:
        The loss by rate, from the smallest rate.
    """
    losses: dict[float, float] = {}
    left = list(first)
    while left:
        losses |= {rate: measure(rate) for rate in left}
        tried = sorted(losses)
        best = min(tried, key=losses.__getitem__)
        low, high = rates.index(tried[0]), rates.index(tried[-1])
        left = []
        if best == tried[0] and low > 0:
            left = [rates[low - 1]]
        elif best == tried[-1] and high < len(rates) - 1:
            left = [rates[high + 1]]
    return {rate: losses[rate] for rate in sorted(losses)}
