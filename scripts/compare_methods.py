"""Compare ways to tune one base model on one data set: quality against the number of trainable parameters.

    python scripts/compare_methods.py --data_dir data/demo --form captain --out_dir out/compare/captain
    python scripts/compare_methods.py --data_dir data/gsm8k --out_dir out/compare/gsm8k --seed 1 --seed 2 --seed 3

Trains each method by its own script in finetune/, on equal terms: the same data in the same order, and the same steps
and schedule. The learning rate of each method is searched first. The search uses training data alone, and holds a part
of it out to measure the loss. As long as the largest or the smallest rate is the best, the next one is tried too.

Writes four files to `--out_dir`: `table.md`, `results.csv` and `search.csv` with a row for each run, and
`comparison.png`. The same command continues a comparison that was interrupted: finished runs are not repeated, and an
unfinished one is resumed.
"""

import csv
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.adapters import read_adapter
from lit_llama.base import Base, open_base
from lit_llama.data import open_data
from lit_llama.data_writing import hold_out
from lit_llama.devices.precision import Precision
from lit_llama.evaluation.answers import Question, answer_questions, read_answers, read_test_questions
from lit_llama.evaluation.forms import FORMS, FormName
from lit_llama.figures import label_points, picture
from lit_llama.files import atomic_file, read_json, write_json
from lit_llama.script.command_line import DIVERGED, run
from lit_llama.tables import markdown
from lit_llama.tuning import RATES, search_rates


class Method(NamedTuple):
    """A way to tune.

    Args:
        title: what the table calls it; the size is put in.
        size_option: option of its script in finetune/ that takes the size.
        first_rate: the search begins with this learning rate of `RATES` and the two after it.
        sizes: what a size may be; if empty, any number from 1.
    """

    title: str
    size_option: str
    first_rate: float
    sizes: tuple[str, ...] = ()


@dataclass
class Runs:
    """How far the comparison is.

    Args:
        planned: number of runs; grows when a search has to go on.
        begun: number of runs that were trained, or found trained.
    """

    planned: int
    begun: int = 0

    def next(self) -> str:
        """Count another run, and say which it is."""
        self.begun += 1
        return f"run {self.begun} of {self.planned}"


METHODS = {
    "aligner": Method("Aligner, N = {}", "aligner_length", 1e-2),
    "llama_adapter": Method("LLaMA-Adapter, N = {}", "adapter_length", 1e-2),
    "lora": Method("LoRA, r = {}", "lora_r", 1e-3),
    "bias": Method("Bias, on {}", "bias_target", 3e-3, ("o", "v")),
}
DEFAULT_METHODS = ["aligner-1", "aligner-10", "aligner-100", "llama_adapter-10", "lora-8", "bias-o"]


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/demo"),
    out_dir: Path = Path("out/compare"),
    method: list[str] = DEFAULT_METHODS,
    seed: list[int] = [1337],  # noqa: B006
    steps: int = 144,
    search_steps: int = 60,
    search_share: float = 0.15,
    rates_from: Path | None = None,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    form: FormName | None = None,
    questions_path: Path = Path("examples/questions.jsonl"),
    max_new_tokens: int = 64,
    precision: Precision = "auto",
) -> None:
    """Compare.

    Args:
        checkpoint_dir: folder of the base model.
        data_dir: folder of tokenised examples.
        out_dir: folder for the runs and the results.
        method: method and its size: "aligner-N", "llama_adapter-N", "lora-R", "bias-o" or "bias-v"; may be given
            several times.
        seed: seed of the initialisation and of the order of examples; may be given several times.
        steps: number of optimizer steps of each run; a tenth of them is warm-up, then the learning rate falls to zero.
        search_steps: number of optimizer steps of each run of the search.
        search_share: share of the training examples that the search holds out.
        rates_from: folder of another comparison, whose learning rates are used instead of searching.
        batch_size: number of examples of an optimizer step.
        micro_batch_size: number of examples of a forward pass.
        form: form of the answers; if given, held-out questions are asked, and the answers with this form are counted.
        questions_path: JSON Lines file with "split" and "question"; the questions of the split "test" are asked.
        max_new_tokens: largest number of tokens of an answer.
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere, and says which it takes.
    """
    for name in method:
        parse(name)
    questions = read_test_questions(questions_path) if form is not None else []
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, sys.maxsize)
    settings = {
        "checkpoint_dir": checkpoint_dir,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "precision": precision,
        "max_seq_length": train.header["max_seq_length"],
    }
    runs = Runs(len(method) * len(seed))
    if rates_from is None:
        held_out = out_dir / "search" / "data"
        if not held_out.exists():
            hold_out(train, tokenizer, held_out, search_share)
        search_settings = {**settings, "data_dir": held_out, "max_steps": search_steps}
        runs.planned += sum(len(first_rates(name)) for name in method)
        tried = [row for name in method for row in search(name, out_dir / "search", search_settings, runs)]
        write_csv(out_dir / "search.csv", tried)
    rates = best_rates((rates_from or out_dir) / "search.csv", method)

    settings |= {"data_dir": data_dir, "max_steps": steps}
    rows = [
        train_once(name, rates[name], one_seed, out_dir / "runs", settings, runs)
        for name in method
        for one_seed in seed
    ]
    rows.insert(0, {"method": "base", "trainable_parameters": 0, "validation_loss": rows[0]["base_loss"]})
    if form is not None:
        style = train.header["prompt_style"]
        base = open_base(checkpoint_dir, prompt_style=style, precision=precision, for_generation=True)
        add_compliance(rows, form, questions, base, max_new_tokens, out_dir)
    write_csv(out_dir / "results.csv", rows)
    table = render(rows, form)
    with atomic_file(out_dir / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    what = (
        f"{checkpoint_dir.name} on {data_dir.name}: {len(validation)} held-out examples, {steps} steps of {batch_size}"
    )
    draw(rows, form, what, out_dir / "comparison.png")
    print(table, end="")
    print(f"picture: {out_dir / 'comparison.png'}", file=sys.stderr)


def parse(name: str) -> tuple[str, str]:
    """A method's kind and size.

    Raises:
        ValueError: there is no such method.
    """
    kind, _, size = name.partition("-")
    possible = kind in METHODS and (
        size in METHODS[kind].sizes if METHODS[kind].sizes else size.isdecimal() and int(size) > 0
    )
    if not possible:
        raise ValueError(f"--method {name}: expected a method and its size, such as {', '.join(DEFAULT_METHODS)}")
    return kind, size


def first_rates(name: str) -> list[float]:
    """The learning rates that the search for a method begins with."""
    low = RATES.index(METHODS[parse(name)[0]].first_rate)
    return RATES[low : low + 3]


def search(name: str, folder: Path, settings: dict[str, Any], runs: Runs) -> list[dict[str, Any]]:
    """Train with several learning rates; a row for each, in the order of the rates."""
    rows: dict[float, dict[str, Any]] = {}

    def measure(rate: float) -> float:
        runs.planned += rate not in first_rates(name)
        rows[rate] = train_once(name, rate, 1337, folder, settings, runs)
        return rows[rate]["validation_loss"]

    return [rows[rate] for rate in search_rates(measure, first_rates(name), RATES)]


def best_rates(path: Path, methods: list[str]) -> dict[str, float]:
    """The learning rate with the lowest loss for each method in a `search.csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a method.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --rates_from takes the --out_dir of a comparison")
    with open(path, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["validation_loss"]), reverse=True)
    rates = {row["method"]: float(row["learning_rate"]) for row in rows}  # the lowest loss comes last
    if missing := set(methods) - rates.keys():
        raise ValueError(f"{path} has no learning rate for {', '.join(sorted(missing))}")
    return rates


def train_once(name: str, rate: float, seed: int, folder: Path, settings: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Train by a script of finetune/, unless it was done; what came of it.

    Raises:
        ValueError: it was done with other settings.
        OSError: the script failed.
    """
    kind, size = parse(name)
    out_dir = folder / f"{name}-rate-{rate:g}-seed-{seed}"
    options = {key: str(value) for key, value in settings.items()}
    options |= {METHODS[kind].size_option: size, "learning_rate": str(rate), "seed": str(seed)}
    options |= {"warmup_steps": str(settings["max_steps"] // 10), "eval_interval": str(settings["max_steps"])}
    done = out_dir / "result.json"
    if done.is_file():
        result = read_json(done)
        if result["options"] != options:
            raise ValueError(f"{out_dir} was made with other settings: choose another --out_dir, or remove it")
        print(f"{runs.next()}, found trained: {out_dir}", file=sys.stderr)
        return result["row"]
    print(f"{runs.next()}: training {out_dir}", file=sys.stderr)
    script = Path(__file__).parents[1] / "finetune" / f"{kind}.py"
    arguments = [f"--{key}={value}" for key, value in {**options, "out_dir": out_dir, "resume": "true"}.items()]
    status = subprocess.run([sys.executable, str(script), *arguments]).returncode
    metrics = out_dir / "metrics.csv"
    if status and not (status == DIVERGED and metrics.is_file()):
        raise OSError(f"{script.name} failed with status {status} for {out_dir}")
    with open(metrics, newline="") as file:
        steps = list(csv.DictReader(file))
    adapter_path = out_dir / f"{kind}.safetensors"
    row = {"method": name, "learning_rate": rate, "seed": seed, "base_loss": float(steps[0]["validation_loss"])}
    if status:  # it diverged
        row |= {"trainable_parameters": 0, "validation_loss": math.inf}
    else:
        adapter, info = read_adapter(adapter_path)
        row["trainable_parameters"] = sum(parameter.numel() for parameter in adapter.parameters())
        row["validation_loss"] = info.validation_loss
        row |= {"seconds": float(steps[-1]["seconds"]), "adapter_path": str(adapter_path)}
    write_json(done, {"options": options, "row": row})
    return row


def add_compliance(
    rows: list[dict[str, Any]],
    form: FormName,
    questions: list[Question],
    base: Base,
    max_new_tokens: int,
    out_dir: Path,
) -> None:
    """Ask each model the questions, unless that was done, and add the share of answers with the form to its row.

    A run that diverged left no model to ask.
    """
    for row in rows:
        adapter_path = Path(row["adapter_path"]) if "adapter_path" in row else None
        if adapter_path is None and row["method"] != "base":
            continue
        file = (adapter_path or out_dir / "base").with_suffix(".answers.jsonl")
        model = base.with_adapter(adapter_path)
        answer_questions(model, row["method"], questions, file, max_new_tokens=max_new_tokens, batch_size=24)
        answers = read_answers(file)
        row["compliance"] = statistics.mean(FORMS[form].check(answers[one.id][0]) for one in questions)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, whose columns are all that occur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the base and of runs that did not diverge."""
    return [row for row in rows if math.isfinite(row["validation_loss"])]


def summarise(rows: list[dict[str, Any]], column: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds, by method, of the runs that did not diverge."""
    values: dict[str, list[float]] = {}
    for row in finished(rows):
        values.setdefault(row["method"], []).append(row[column])
    return {
        name: (statistics.mean(some), statistics.stdev(some) if len(some) > 1 else 0.0) for name, some in values.items()
    }


def title(name: str) -> str:
    """What a method is called."""
    if name == "base":
        return "base model"
    kind, size = parse(name)
    return METHODS[kind].title.format(size)


def render(rows: list[dict[str, Any]], form: str | None) -> str:
    """The table in Markdown."""
    seeds = max(sum(row["method"] == name for row in rows) for name in {row["method"] for row in rows})
    losses = summarise(rows, "validation_loss")
    shares = summarise(rows, "compliance") if form else {}
    by_name = {row["method"]: row for row in [*rows, *finished(rows)]}
    header = ["method", "trainable parameters", "learning rate", "validation loss"]
    header += [f"answers with the form {form}"] if form else []
    header += ["seconds of a run"]

    def over_seeds(name: str, values: dict[str, tuple[float, float]], spec: str) -> str:
        if name not in values:
            return "diverged"
        mean, deviation = values[name]
        runs = [row for row in rows if row["method"] == name]
        failed = len(runs) - len(finished(runs))
        return (
            f"{mean:{spec}}"
            + (f" ± {deviation:{spec}}" if deviation else "")
            + (f", {failed} of {len(runs)} diverged" if failed else "")
        )

    cells = []
    for name, row in by_name.items():
        times = [one["seconds"] for one in rows if one["method"] == name and "seconds" in one]
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else ""
        parameters = f"{row['trainable_parameters']:,}" if name in losses else ""
        cells.append([title(name), parameters, rate, over_seeds(name, losses, ".4f")])
        cells[-1] += [over_seeds(name, shares, ".1%")] if form else []
        cells[-1] += [f"{statistics.mean(times):.0f}" if times else ""]
    note = f"\nMeans and standard deviations over {seeds} seeds.\n" if seeds > 1 else ""
    return markdown(header, cells) + "\n" + note


def draw(rows: list[dict[str, Any]], form: str | None, what: str, path: Path) -> None:
    """Draw quality against the number of trainable parameters, with the spread over seeds, titled with `what`.

    Runs that diverged are not drawn.
    """
    rows = finished(rows)
    panels = [("validation_loss", "validation loss (nats per token)")]
    panels += [("compliance", f"held-out answers with the form {form}")] if form else []
    seeds = len({row["seed"] for row in rows if "seed" in row})
    spread = f", means and standard deviations over {seeds} seeds" if seeds > 1 else ""
    with picture(path, what + spread, 6 * len(panels), 5) as figure:
        shown = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axes, (column, quality) in zip(shown, panels, strict=True):
            draw_panel(axes, rows, column)
            axes.set_ylabel(quality)
        lines, labels = axes.get_legend_handles_labels()  # those of the first panel, and perhaps the base
        figure.legend(lines, labels, fontsize="small", ncols=len(labels), frameon=False, loc="outside lower center")
        parameters = {row["method"]: row["trainable_parameters"] for row in rows if row["method"] != "base"}
        for axes, (column, _) in zip(shown, panels, strict=True):
            means = summarise(rows, column)
            label_points(axes, {name: (count, means[name][0]) for name, count in parameters.items()})


def draw_panel(axes: Any, rows: list[dict[str, Any]], column: str) -> None:
    """Draw one measure of every method. The loss of the base is a note, as it would hide the differences."""
    summary = summarise(rows, column)
    parameters = {row["method"]: row["trainable_parameters"] for row in rows}
    if column == "compliance":
        axes.axhline(summary["base"][0], color="gray", linestyle="--", label="base model")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_ylim(-0.05, 1.15)
    else:
        axes.set_title(f"the base model, at {summary['base'][0]:.4f}, is outside of this axis", fontsize="small")
    for i, kind in enumerate(METHODS):
        names = sorted((name for name in summary if name.startswith(f"{kind}-")), key=parameters.__getitem__)
        if not names:
            continue
        means, deviations = zip(*(summary[name] for name in names), strict=True)
        label = METHODS[kind].title.partition(",")[0]
        x = [parameters[name] for name in names]
        axes.errorbar(x, means, deviations, marker="o", capsize=3, color=f"C{i}", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    run(main)
