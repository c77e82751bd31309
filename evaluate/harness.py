"""Evaluate a base model, perhaps with an adapter, on the tasks of EleutherAI's Language Model Evaluation Harness.

    python evaluate/harness.py --tasks mmlu,gsm8k --limit 20
    python evaluate/harness.py --adapter_path out/demo/aligner.safetensors --tasks hellaswag --chat_template true
    python evaluate/harness.py --tasks mmlu --data_dir data --questions 1000
    torchrun --nproc_per_node 4 evaluate/harness.py --tasks mmlu

Prints the harness's own table, and writes its `results.json` and every question with its answer, `samples.jsonl`, to
--out_dir. Answers are kept as they come; the same command goes on where it was interrupted.
"""

from pathlib import Path

from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.files import require_extra
from lit_llama.script.command_line import open_with_adapters, run
from lit_llama.script.launch import join_processes


def main(
    tasks: str,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    data_dir: Path | None = None,
    out_dir: Path = Path("out/harness"),
    num_fewshot: int | None = None,
    limit: int | None = None,
    questions: int | None = None,
    seed: int = 1337,
    chat_template: bool = False,
    batch_size: int = 16,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Evaluate.

    Args:
        tasks: names of the harness's tasks, with commas between; `lm_eval ls tasks` lists them.
        checkpoint_dir: folder of the base model.
        adapter_path: an adapter of any method; may be given several times, to be added up.
        adapter_scale: what it is multiplied by; may be given once for each.
        data_dir: folder of local copies of the data, instead of the hub: `mmlu/{dev,test}/SUBJECT_{dev,test}.csv`,
            `gsm8k/{train,test}.jsonl`.
        out_dir: where results go.
        num_fewshot: examples before each question; if not given, as many as the task says.
        limit: the first questions of each task alone.
        questions: or as many, drawn at random from all tasks together.
        seed: of that draw.
        chat_template: put prompts in the model's chat format, examples as turns.
        batch_size: requests at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    require_extra("lm_eval", "evaluate")
    from lm_eval.utils import make_table

    from lit_llama.evaluation.harness import HarnessModel, load_tasks, random_questions, run_tasks

    if limit is not None and questions is not None:
        raise ValueError("give --limit or --questions, not both")
    overrides = {} if num_fewshot is None else {"num_fewshot": num_fewshot}
    loaded = load_tasks(tasks.split(","), data_dir, out_dir / "data", **overrides)
    join_processes()
    base = open_with_adapters(checkpoint_dir, adapter_path, adapter_scale, precision, quantize, allow_other_base)
    results = run_tasks(
        HarnessModel(base.model, base.tokenizer, base.adapter, batch_size),
        loaded,
        out_dir,
        name=base.name,
        limit=limit,
        questions=None if questions is None else random_questions(loaded, questions, seed),
        chat_template=chat_template,
    )
    if results is not None:
        print(base.name)
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))


if __name__ == "__main__":
    run(main)
