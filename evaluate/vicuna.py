"""Let models answer the 80 Vicuna questions, or any others in that layout, for a judge or for people to compare.

    python evaluate/vicuna.py --questions_path question.jsonl --model base --model out/demo/aligner.safetensors
    python evaluate/vicuna.py --questions_path examples/safety.jsonl --out_dir out/safety --model base \\
        --model aligned=out/refusal-dpo/aligner.safetensors

A model is "base", or the file of an adapter of any method or its run's folder, perhaps with a name before it. The
questions are at https://github.com/lm-sys/FastChat, `fastchat/llm_judge/data/vicuna_bench/question.jsonl`. Answers are
written in FastChat's layout as they come, `OUT_DIR/model_answer/MODEL.jsonl`; the same command goes on where it was
interrupted, and an adapter that was trained again answers again.
"""

from pathlib import Path
from typing import Any

from lit_llama.adapters import adapter_file
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.answers import ANSWERS, QUESTIONS, answer_questions, read_questions, write_questions
from lit_llama.script.command_line import column_names, open_columns, run


def main(
    model: list[str] = ["base", "out/demo/aligner.safetensors"],  # noqa: B006
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    questions_path: Path = Path("data/vicuna/question.jsonl"),
    out_dir: Path = Path("out/vicuna"),
    style: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 1337,
    batch_size: int = 16,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Answer.

    Args:
        model: "base", or PATH or NAME=PATH of an adapter's file or its run's folder; may be given several times.
        checkpoint_dir: folder of the base model.
        questions_path: FastChat's JSON Lines with "question_id", "category" and "turns"; or with "prompt", or with
            "instruction" and "input"; or a text file with a prompt on each line.
        out_dir: where questions and answers go.
        style: prompt style of all models; if not given, the one that each adapter was trained with, and the
            base's own chat template for the base.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        seed: of sampling.
        batch_size: questions at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits; if not given, as the adapters were trained.
        allow_other_base: use adapters on other weights than those they were trained on.
    """
    questions = read_questions(questions_path)
    paths: dict[str, Path | None] = {}
    for text in model:
        name, equals, path = text.partition("=")
        if not equals:
            path, [name] = text, ["base"] if text == "base" else column_names([Path(text)])
        if name in paths or not name or "/" in name:
            raise ValueError(f"--model {text}: the name {name!r} is taken or no name; give another, NAME=PATH")
        paths[name] = None if path == "base" else adapter_file(path)
    kept = out_dir / QUESTIONS
    if kept.is_file() and read_questions(kept) != questions:
        raise ValueError(f"{out_dir} holds answers to other questions: choose another --out_dir")
    base, tokenizer, columns = open_columns(checkpoint_dir, paths, style, precision, quantize, allow_other_base)
    write_questions(kept, questions)
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for column in columns:
        file = out_dir / ANSWERS / f"{column.name}.jsonl"
        answer_questions(base, tokenizer, column, questions, file, batch_size=batch_size, **sizes)
        print(f"{file}: {len(questions)} answers")


if __name__ == "__main__":
    run(main)
