"""Evaluate a base model, perhaps with an adapter, on the tasks of EleutherAI's Language Model Evaluation Harness.

    python evaluate/harness.py --tasks mmlu,gsm8k --limit 20
    python evaluate/harness.py --adapter_path out/demo/aligner.safetensors --tasks hellaswag --chat_template true
    python evaluate/harness.py --tasks mmlu --data_dir data --questions 1000
    torchrun --nproc_per_node 4 evaluate/harness.py --tasks mmlu

Prints the harness's own table, and writes its `results.json` and every question with its answer, `samples.jsonl`, to
--out_dir. Answers are kept as they come; the same command goes on where it was interrupted.
"""

from pathlib import Path
from typing import Any

from lit_llama.files import require_extra
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import task_model
from lit_llama.script.launch import join_processes


def main(
    tasks: str,
    data_dir: Path | None = None,
    out_dir: Path = Path("out/harness"),
    num_fewshot: int | None = None,
    limit: int | None = None,
    questions: int | None = None,
    seed: int = 1337,
    chat_template: bool = False,
    batch_size: int = 16,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        tasks: names of the harness's tasks, separated by commas; `lm_eval ls tasks` lists them.
        data_dir: folder of local copies of the data, instead of the hub: `mmlu/{dev,test}/SUBJECT_{dev,test}.csv`,
            `gsm8k/{train,test}.jsonl`.
        out_dir: folder of the results.
        num_fewshot: number of examples before each question; if not given, as many as the task says.
        limit: number of questions of each task, the first ones; if not given, all.
        questions: number of questions, drawn at random from all tasks together; if not given, all.
        seed: seed of that draw.
        chat_template: put prompts in the model's chat format, examples as turns.
        batch_size: number of requests computed at once.
        options: those of the model, see `evaluated_model`.
    """
    require_extra("lm_eval", "evaluate")
    from lm_eval.utils import make_table

    from lit_llama.evaluation.harness import HarnessModel, run_tasks
    from lit_llama.evaluation.tasks import load_tasks, random_questions

    if limit is not None and questions is not None:
        raise ValueError("give --limit or --questions, not both")
    overrides = {} if num_fewshot is None else {"num_fewshot": num_fewshot}
    loaded = load_tasks(tasks.split(","), data_dir, out_dir / "data", **overrides)
    join_processes()
    lm = HarnessModel(task_model(chat_template, **options), batch_size)
    results = run_tasks(
        lm,
        loaded,
        out_dir,
        limit=limit,
        questions=None if questions is None else random_questions(loaded, questions, seed),
        chat_template=chat_template,
    )
    if results is not None:
        print(lm.name)
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))


if __name__ == "__main__":
    run(main)
