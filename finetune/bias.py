"""Fine-tune a bias: one free vector for each layer, added to the output of a projection.

    python finetune/bias.py
    python finetune/bias.py --data_dir data/mine --bias_target v --out_dir out/mine

On the output projection it is what a one-token Aligner becomes, with every number free, and so its natural baseline;
on the value projection it is BEFT (arXiv 2509.15974).

Needs the folder of a base model (Hugging Face's as it is, or one that scripts/convert_*_checkpoint.py wrote) and data
made by one of scripts/prepare_*.py.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.bias import Bias
from lit_llama.checkpoint import read_config
from lit_llama.data import Batch, open_data
from lit_llama.losses import LossSums
from lit_llama.plan import Decay, Plan
from lit_llama.samples import sample_answers
from lit_llama.script.command_line import run
from lit_llama.script.conditions import Conditions
from lit_llama.script.machine import build_all
from lit_llama.training import fit
from lit_llama.tuning import find_learning_rate


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/demo"),
    out_dir: Path = Path("out/bias"),
    bias_target: Literal["o", "v"] = "o",
    learning_rate: float | Literal["auto"] = 1e-2,
    decay: Decay = "linear",
    weight_decay: float = 0.02,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    epochs: int = 2,
    max_steps: int | None = None,
    warmup_steps: int | None = None,  # 10, or a tenth of a run that is shorter
    max_seq_length: int = 512,
    pack: bool = False,
    max_grad_norm: float | None = None,
    eval_interval: int = 48,
    patience: int | None = None,
    seed: int = 1337,
    **conditions: Any,
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: folder of the tokenised examples.
        out_dir: folder for the adapter, its training states, metrics and the picture of the loss.
        bias_target: projection whose output the vectors are added to: "o", the output projection of the attention, or
            "v", the value projection.
        learning_rate: peak of the learning rate, reached at the end of warm-up; "auto" tries a few for a few steps on a
            part of the training examples kept apart, and takes the best.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: weight decay of AdamW.
        batch_size: number of examples per optimizer step, over all devices.
        micro_batch_size: number of examples per forward on one device.
        epochs: number of times that every example is read, unless --max_steps is given.
        max_steps: number of optimizer steps.
        warmup_steps: number of optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a
            run of fewer steps than that.
        max_seq_length: number of tokens of the longest example that is accepted; prepare the data with this length.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: norm that larger gradients are scaled down to.
        eval_interval: number of optimizer steps between validations, which also show a few answers.
        patience: number of validations in a row without a lower loss after which the run ends early.
        seed: seed of the initialisation and of the order of the examples.
        conditions: what all scripts of finetune/ have: other adapters, scales, text to keep, the machine; see
            `Conditions`.
    """
    options = dict(locals())
    torch.manual_seed(seed)
    setup, plan, bias = build_all(
        lambda: Conditions(**conditions),
        lambda: Plan(
            learning_rate=learning_rate, decay=decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            epochs=epochs, max_steps=max_steps, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
            eval_interval=eval_interval, patience=patience, seed=seed, pack=pack,
        ),
        lambda: Bias(read_config(checkpoint_dir), bias_target),
    )  # fmt: skip
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length)
    plan = plan.for_items(len(train))

    fabric, base, objective = setup.open(checkpoint_dir, train.header["prompt_style"], plan, out_dir)
    bias.to(fabric.device)
    optimizer = torch.optim.AdamW(bias.parameters(), weight_decay=weight_decay)

    def loss(batch: Batch) -> LossSums:
        return objective.supervised(bias, batch)

    def show_answers() -> str:
        return sample_answers(base.model, objective.together(bias), tokenizer, base.style, validation)

    plan = find_learning_rate(
        fabric, bias, optimizer, loss, train, tokenizer, plan,
        measured=objective.measured(), resume_dir=setup.resume_dir(out_dir),
    )  # fmt: skip
    folder = setup.run_folder(out_dir, base, options, objective)
    fit(
        fabric, bias, optimizer, loss, train, validation, plan, folder,
        measured=objective.measured(), show_answers=show_answers,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
