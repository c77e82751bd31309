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
from lit_llama.evaluation.answers import ANSWERS, QUESTIONS, read_questions
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import ask, column_names


def main(
    model: list[str] = ["base", "out/demo/aligner.safetensors"],  # noqa: B006
    questions_path: Path = Path("data/vicuna/question.jsonl"),
    out_dir: Path = Path("out/vicuna"),
    max_new_tokens: int = 512,
    **options: Any,
) -> None:
    """Answer.

    Args:
        model: "base", or PATH or NAME=PATH of an adapter's file or its run's folder; may be given several times.
        questions_path: FastChat's JSON Lines with "question_id", "category" and "turns"; or with "prompt", or with
            "instruction" and "input"; or a text file with a prompt on each line.
        out_dir: folder of questions and answers.
        max_new_tokens: length of the longest answer, in tokens.
        options: those of every evaluation with answers, see `ask`.
    """
    questions = read_questions(questions_path)
    mixtures: dict[str, dict[Path, float]] = {}
    for text in model:
        name, equals, path = text.partition("=")
        if not equals:
            path, [name] = text, ["base"] if text == "base" else column_names([Path(text)])
        if name in mixtures or not name or "/" in name:
            raise ValueError(f"--model {text}: {name!r} is taken, or is not a name; give another, NAME=PATH")
        mixtures[name] = {} if path == "base" else {adapter_file(path): 1.0}
    kept = out_dir / QUESTIONS
    if kept.is_file() and read_questions(kept) != questions:
        raise ValueError(f"{out_dir} holds answers to other questions: choose another --out_dir")
    for name in ask(mixtures, questions, out_dir, max_new_tokens=max_new_tokens, **options)[0]:
        print(f"{out_dir / ANSWERS / name}.jsonl: {len(questions)} answers")


if __name__ == "__main__":
    run(main)
