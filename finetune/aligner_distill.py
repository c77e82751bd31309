"""Distil a system prompt, or other adapters, into an Aligner: the model behaves as if the prompt were there.

    python finetune/aligner_distill.py --system_prompt_file brand_voice.txt --out_dir out/brand
    python finetune/aligner_distill.py --teacher_adapter out/lora --questions_file questions.txt --out_dir out/small

The teacher is the base model with the prompt in its context, or with other adapters, or both; the student is the base
model without them, with a new adapter. The teacher answers questions, once, and the student learns the teacher's
distribution of each token of the answers (arXiv 2209.15189). Both share one base in memory. Questions need no answers;
the repository has some.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.adapters import Method, new_adapter
from lit_llama.checkpoint import read_config
from lit_llama.data import Batch, open_data
from lit_llama.losses import DISTILLATION_METRICS, LossSums, distillation_loss
from lit_llama.plan import Decay, Plan
from lit_llama.samples import sample_answers
from lit_llama.script.answers import search_pattern
from lit_llama.script.command_line import run
from lit_llama.script.conditions import Conditions
from lit_llama.script.distillation_report import compare, write_report
from lit_llama.script.machine import build_all
from lit_llama.script.questions import read_context, read_questions
from lit_llama.script.teacher import check_teacher, teach, that_fit
from lit_llama.together import read_adapters
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import fit
from lit_llama.tuning import find_learning_rate


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    system_prompt_file: Path | None = None,
    teacher_adapter: list[Path] | None = None,
    teacher_scale: list[float] | None = None,
    questions_file: Path = Path("examples/questions.jsonl"),
    take_answers: bool = False,
    prompt_style: str | None = None,
    data_dir: Path = Path("data/distill"),
    out_dir: Path = Path("out/distill"),
    answers: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    answer_batch_size: int = 16,
    validation_share: float = 0.1,
    method: Method = "aligner",
    aligner_length: int | None = None,  # 1
    learning_rate: float | Literal["auto"] | None = None,
    decay: Decay = "linear",
    weight_decay: float = 0.02,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    epochs: int = 2,
    max_steps: int | None = None,
    warmup_steps: int | None = None,  # 10, or a tenth of a run that is shorter
    pack: bool = False,
    max_grad_norm: float | None = None,
    eval_interval: int = 48,
    patience: int | None = None,
    seed: int = 1337,
    matches: str | None = None,
    asked: int = 48,
    **conditions: Any,
) -> None:
    """Distil.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        system_prompt_file: text file of the system prompt; or JSON, a list of turns with "role" and "content", for a
            system prompt with examples of questions and answers.
        teacher_adapter: file or run folder of an adapter of the teacher, of any method; may be given several times, to
            add up adapters.
        teacher_scale: number that the teacher's adapter is multiplied by; may be given once for each adapter. 1 if not
            given.
        questions_file: text file with a question on each line; records with "question", "prompt", "instruction" or
            "messages", perhaps with a "split"; or the folder of a tokenised data set, whose prompts are taken.
        take_answers: take the answers in --questions_file, which may be a file of answers in --data_dir, and let the
            teacher answer nothing itself.
        prompt_style: how a prompt is written for the model: "chat" (the model's own template), "chat-thinking-on" or
            "chat-thinking-off" (the same where it has a switch for that), "alpaca", "metamath", "beaver", "hh" or
            "none"; if not given, as the teacher's first adapter was trained, and for a base model alone "chat".
        data_dir: folder in which the teacher's answers are kept, in files named by a hash of what made them: another
            run with the same teacher and prompt does not wait for them again.
        out_dir: folder for the adapter, its training states, metrics, pictures and the report.
        answers: number of answers of the teacher to each question; more than 1 need a --temperature.
        temperature: randomness of the teacher's answers; 0 always takes the likeliest token.
        max_new_tokens: length of the longest answer, in tokens; a longer one is cut, and does not teach to end there.
        answer_batch_size: number of questions that are answered at once.
        validation_share: share of the questions that is kept for validation, drawn at random, if the file has no
            splits.
        method: method of the new adapter; all but an Aligner have their default sizes.
        aligner_length: number of prefix tokens N of a new Aligner, 1 if not given.
        learning_rate: peak of the learning rate, reached at the end of warm-up; if not given, 3e-2 for aligner and
            llama_adapter, 1e-2 for bias, 3e-3 for lora; "auto" tries a few around that for a few steps on a part of the
            training examples kept apart, and takes the best.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: weight decay of AdamW.
        batch_size: number of answers per optimizer step, over all devices.
        micro_batch_size: number of answers per forward on one device.
        epochs: number of times that every answer is read, unless --max_steps is given.
        max_steps: number of optimizer steps.
        warmup_steps: number of optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a
            run of fewer steps than that.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: norm that larger gradients are scaled down to.
        eval_interval: number of optimizer steps between validations, which also show a few answers.
        patience: number of validations in a row without a lower loss after which the run ends early.
        seed: seed of the initialisation, of the order of the examples, and of the teacher's answers.
        matches: regular expression of the form that is wanted; the report counts the answers in which it is found.
            "(?s)^Ahoy.*Salt$" wants a beginning and an end.
        asked: number of held-out questions that base, teacher and student answer for the report: those whose split is
            "test", if there are any, or those of validation.
        conditions: what all scripts of finetune/ have: other adapters, text to keep, the machine; see `Conditions`. A
            teacher does not say what lies between it and the base, so --scale_range is refused.
    """
    options = dict(locals())
    torch.manual_seed(seed)
    refused = {"scale_range": "a dial is trained by finetune/aligner.py, for example on the answers in --data_dir"}
    setup, plan, adapter, context, questions, pattern, taught_by, _ = build_all(
        lambda: Conditions(**conditions).without(refused),
        lambda: Plan(
            learning_rate=learning_rate, decay=decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            epochs=epochs, max_steps=max_steps, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
            eval_interval=eval_interval, patience=patience, seed=seed, pack=pack,
        ),
        lambda: new_adapter(read_config(checkpoint_dir), method, aligner_length),
        lambda: read_context(system_prompt_file),
        lambda: read_questions(questions_file, Tokenizer(checkpoint_dir), take_answers, validation_share, seed),
        lambda: search_pattern(matches),
        lambda: read_adapters(teacher_adapter, read_config(checkpoint_dir)),
        lambda: check_teacher(
            system_prompt_file, teacher_adapter, take_answers, temperature, answers,
            max_new_tokens=max_new_tokens, answer_batch_size=answer_batch_size, asked=asked,
        ),
    )  # fmt: skip

    fabric, base, objective = setup.open(checkpoint_dir, prompt_style, plan, out_dir, taught_by)
    teacher = base.with_adapter(taught_by, teacher_scale)
    questions = that_fit(fabric, teacher, context, questions, max_new_tokens)
    generation = {"max_new_tokens": max_new_tokens, "batch_size": answer_batch_size}
    sampling = {"answers": answers, "temperature": temperature, "seed": seed}
    folder = teach(fabric, teacher, context, questions, data_dir, **sampling, **generation)
    window = base.model.config.block_size
    tokenizer, (train, validation) = open_data(checkpoint_dir, folder, window, kind="distillation")
    student = teacher.with_adapter(objective.together(adapter.to(fabric.device)))
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=weight_decay)

    def loss(batch: Batch) -> LossSums:
        for_student, for_teacher = batch.of_two()
        sums = distillation_loss(base.model, student.adapter, teacher.adapter, for_student, for_teacher)
        return objective.keep(sums, adapter, for_student)

    def show_answers() -> str:
        return sample_answers(base.model, student.adapter, tokenizer, student.style, validation, with_base=True)

    measured = objective.measured(DISTILLATION_METRICS)
    plan = find_learning_rate(
        fabric, adapter, optimizer, loss, train, tokenizer, plan.for_items(len(train)),
        measured=measured, resume_dir=setup.resume_dir(out_dir),
    )  # fmt: skip
    run_folder = setup.run_folder(out_dir, student, options, objective, {"teacher": teacher.identity})
    progress = fit(
        fabric, adapter, optimizer, loss, train, validation, plan, run_folder,
        measured=measured, show_answers=show_answers,
    )  # fmt: skip

    run_folder.restore_best(adapter.eval())
    found = compare(student, teacher, context, questions, pattern, most=asked, **generation)
    if fabric.is_global_zero:
        print(write_report(found, progress, checkpoint_dir, out_dir), end="")


if __name__ == "__main__":
    run(main)
