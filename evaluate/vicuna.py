"""Let models answer the 80 Vicuna questions, or any others in that layout, for a judge or for people to compare.

    python evaluate/vicuna.py --questions_path question.jsonl --model base --model out/demo/aligner.safetensors
    python evaluate/vicuna.py --questions_path examples/safety.jsonl --out_dir out/safety --model base \\
        --model aligned=out/refusal-dpo/aligner.safetensors

A model is "base", or the file of an adapter of any method, perhaps with a name before it. The questions are at
https://github.com/lm-sys/FastChat, `fastchat/llm_judge/data/vicuna_bench/question.jsonl`. Answers are written in
FastChat's layout as they come, `OUT_DIR/model_answer/MODEL.jsonl`; the same command goes on where it was interrupted.
"""

import shutil
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from lit_llama.answers import ANSWERS, QUESTIONS, append_row, read_kept, read_questions
from lit_llama.checkpoint import Precision, check_adapter, load_adapter
from lit_llama.cli import open_base, run
from lit_llama.generation import Request, complete
from lit_llama.inference import WeightOnly
from lit_llama.model import Adapter
from lit_llama.prompts import Message, prompt_style
from lit_llama.quantization import Quantize


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
        model: "base", or PATH or NAME=PATH of an adapter; may be given several times.
        checkpoint_dir: folder of the base model.
        questions_path: JSON Lines with "question_id", "category" and "turns".
        out_dir: where questions and answers go.
        style: prompt style of all models; if not given, the one that each adapter was trained with, and "chat" for the
            base.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        seed: of sampling.
        batch_size: questions at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits.
        allow_other_base: use adapters on other weights than those they were trained on.
    """
    paths: dict[str, Path | None] = {}
    for text in model:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = ("base", None) if text == "base" else (Path(text).parent.name or Path(text).stem, text)
        if name in paths or not name or "/" in name:
            raise ValueError(f"--model {text}: the name {name!r} is taken or no name; give another, NAME=PATH")
        paths[name] = None if path is None else Path(path)
    questions = read_questions(questions_path)
    kept = out_dir / QUESTIONS
    if kept.is_file() and read_questions(kept) != questions:
        raise ValueError(f"{out_dir} holds answers to other questions: choose another --out_dir")
    adapters = {name: None if path is None else load_adapter(path) for name, path in paths.items()}
    base, tokenizer = open_base(checkpoint_dir, precision, quantize)
    styles = {}
    for name, path in paths.items():
        trained = "chat" if path is None else check_adapter(path, base, allow_other_base).prompt_style
        styles[name] = prompt_style(style or trained or "alpaca", tokenizer)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():
        shutil.copyfile(questions_path, kept)
    for name, adapter in adapters.items():
        file = out_dir / ANSWERS / f"{name}.jsonl"
        there = {row["question_id"] for row in read_kept(file)}
        left = [question for question in questions if question.id not in there]
        moved: Adapter | None = None if adapter is None else adapter.to(base.device)
        # Turn by turn: whoever has said all is written down, the others go on.
        said: dict[int | str, list[str]] = {question.id: [] for question in left}
        turn = 0
        while left:
            requests = []
            for question in left:
                messages = [Message("user", question.turns[0])]
                for answer, following in zip(said[question.id], question.turns[1:], strict=False):
                    messages += [Message("assistant", answer), Message("user", following)]
                ids = tokenizer.encode(styles[name].render(messages), bos=styles[name].bos)
                generator = torch.Generator(base.device).manual_seed(seed)
                options = {"temperature": temperature, "generator": generator}
                requests.append(Request(ids, moved, max_new_tokens, styles[name].stop_ids, **options))
            rows = complete(base, requests, batch_size)
            for question, ids in zip(
                left, tqdm(rows, total=len(left), desc=f"{name}, turn {turn + 1}", leave=False), strict=True
            ):
                said[question.id].append(styles[name].cut(tokenizer.decode(ids)))
                if len(question.turns) == turn + 1:
                    row = {"question_id": question.id, "answer_id": uuid.uuid4().hex, "model_id": name}
                    choices = [{"index": 0, "turns": said[question.id]}]
                    append_row(file, {**row, "choices": choices, "tstamp": time.time()})
            turn += 1
            left = [question for question in left if len(question.turns) > turn]
        print(f"{file}: {len(questions)} answers")


if __name__ == "__main__":
    run(main)
