"""Does a base model, perhaps with an adapter, solve word problems? GSM8K (arXiv 2110.14168), by lm-evaluation-harness.

    python evaluate/gsm8k.py --questions 200
    python evaluate/gsm8k.py --adapter_path out/metamath/aligner.safetensors --setting metamath
    python evaluate/gsm8k.py --data_dir data/gsm8k

The answer that counts is the number after the last "The answer is"; `flexible-extract` takes the last number wherever
it stands. Commas, dollar signs and a full stop at the end do not matter. Results go to --out_dir, as those of
`evaluate/harness.py`; the same command goes on where it was interrupted.
"""

from pathlib import Path
from typing import Any, Literal

from lit_llama.files import require_extra
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import task_model
from lit_llama.script.launch import join_processes

STANDARD = {"standard": "gsm8k_cot", "5-shot": "gsm8k"}  # settings that the harness has a task for
ANSWER = r"[Tt]he (?:final )?answer is:?\s*\$?(-?(?:\d[\d,]*)?\.?\d+)"


def main(
    setting: Literal["standard", "5-shot", "metamath"] = "standard",
    data_dir: Path | None = None,
    out_dir: Path = Path("out/gsm8k"),
    questions: int | None = None,
    seed: int = 1337,
    chat_template: bool = False,
    batch_size: int = 16,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        setting: "standard" is eight examples with a chain of thought (arXiv 2201.11903), "5-shot" five solutions of the
            training split, "metamath" no example and the prompt of MetaMath, as in the Aligner paper.
        data_dir: folder with `train.jsonl` and `test.jsonl`, instead of the hub's data.
        out_dir: folder of the results.
        questions: number of questions, drawn at random from all 1,319; if not given, all.
        seed: seed of that draw.
        chat_template: put prompts in the model's chat format, examples as turns.
        batch_size: number of questions computed at once.
        options: those of the model, see `evaluated_model`.
    """
    require_extra("lm_eval", "evaluate")
    from lm_eval.utils import make_table

    from lit_llama.evaluation.harness import HarnessModel, run_tasks
    from lit_llama.evaluation.tasks import load_tasks, random_questions

    task: str | dict[str, Any] = STANDARD.get(setting) or metamath_task()
    tasks = load_tasks([task], data_dir, out_dir / "data")
    join_processes()
    lm = HarnessModel(task_model(chat_template, **options), batch_size)
    chosen = None if questions is None else random_questions(tasks, questions, seed)
    counts = "exact_match, strict-match"
    results = run_tasks(lm, tasks, out_dir, questions=chosen, chat_template=chat_template, counts=counts)
    if results is not None:
        asked = len(next(iter(results["samples"].values()))) // 2 if questions is None else questions
        print(f"GSM8K, {setting}, {asked} questions, {lm.name}")
        print(make_table(results))


def metamath_task() -> dict[str, Any]:
    """GSM8K with the prompt that models tuned on MetaMathQA know, as a task of the harness."""
    from lit_llama.prompts import metamath

    same_number = {"ignore_case": True, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
    return {
        "task": "gsm8k_metamath",
        "dataset_path": "openai/gsm8k",
        "dataset_name": "main",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": metamath("{{question}}", ""),
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["### Instruction:"], "do_sample": False, "max_gen_toks": 512},
        "filter_list": [
            {
                "name": name,
                "filter": [
                    {"function": "regex", "regex_pattern": regex, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
            for name, regex in (("strict-match", ANSWER), ("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"))
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, **same_number}],
    }


if __name__ == "__main__":
    run(main)
