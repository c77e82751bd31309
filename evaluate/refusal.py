"""Does a model refuse what is plainly harmful, and still answer what only sounds so?

    python evaluate/refusal.py --adapter_path out/refusal-dpo/aligner.safetensors --out_dir out/refusal-dpo
    python evaluate/refusal.py --adapter_path out/a/aligner.safetensors --adapter_path out/b/lora.safetensors

Asks held-out prompts of the base model and of each adapter, and measures on the same prompts how often the chosen
response is likelier than the rejected one. Prompts without kind or responses are taken, too: then it is counted how
many are refused. Writes `report.json` and `report.txt` to `--out_dir` and prints the latter. Answers are kept there as
they come: the same command goes on where it was interrupted, and computes only the log-probabilities again.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.data import collate, tokenize
from lit_llama.evaluation.answers import Question, as_question, prompt_rows
from lit_llama.evaluation.forms import refuses
from lit_llama.files import atomic_file, write_json
from lit_llama.losses import response_logprobs
from lit_llama.prompts import Message
from lit_llama.script.command_line import DEMO_BASE, peak_memory, run, try_next
from lit_llama.script.evaluation import ask, column_names
from lit_llama.tables import side_by_side


def main(
    adapter_path: list[Path],
    pairs_path: Path = Path("examples/preferences/test.jsonl"),
    out_dir: Path = Path("out/refusal-dpo"),
    max_new_tokens: int = 48,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        adapter_path: file or run folder of an adapter of any method; may be given several times.
        pairs_path: JSON Lines with "prompt", "kind" ("harmful" or "harmless"), "chosen" and "rejected"; or any prompts
            that `generate/aligner.py --prompts_file` takes.
        out_dir: folder of answers and report.
        max_new_tokens: length of the longest answer, in tokens; a longer one is cut and counts as it stands.
        options: those of every evaluation with answers, see `ask`.
    """
    rows = read_rows(pairs_path)
    questions = [Question(number, row.get("kind", "all"), [row["prompt"]], row["input"]) for number, row in
                 enumerate(rows, start=1)]  # fmt: skip
    paths = column_names(adapter_path, "base")
    mixtures = {"base": {}, **{name: {path: 1.0} for name, path in paths.items()}}
    models, answers = ask(mixtures, questions, out_dir, max_new_tokens=max_new_tokens, **options)
    results = []
    for name, base in models.items():
        texts = [answers[name][question.id][0] for question in questions]
        logprobs = pair_logprobs(base, rows, name) if "chosen" in rows[0] else None
        results.append({"name": name, **measure(rows, texts, logprobs), "answers": texts})
    report = {
        "pairs_path": str(pairs_path),
        "base": models["base"].name,
        "checkpoint_dir": str(options.get("checkpoint_dir", DEMO_BASE)),
        "prompt_styles": {name: base.style.name for name, base in models.items()},
        "adapters": [str(path) for path in paths.values()],
        "training_seconds": [info.seconds for base in models.values() for info in base.infos],
        "peak_memory": peak_memory(),
        "prompts": rows,
        "models": results,
    }
    write_json(out_dir / "report.json", report)
    text = render(report, out_dir)
    with atomic_file(out_dir / "report.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Prompts with `input`, and for all of them or for none `kind`, and `chosen` and `rejected`.

    Raises:
        ValueError: a row is not a prompt, or lacks what others have.
    """
    rows: list[dict[str, str]] = []
    for number, (place, row) in enumerate(prompt_rows(path), start=1):
        question = as_question(place, row, number)
        if len(question.turns) > 1:
            raise ValueError(f"{place}: a question of {len(question.turns)} turns; expected one")
        found = {"prompt": question.turns[0], "input": question.input}
        if row.get("kind") is not None:
            if row["kind"] not in ("harmful", "harmless"):
                raise ValueError(f"{place}: expected 'harmful' or 'harmless' under 'kind', found {row['kind']!r}")
            found["kind"] = row["kind"]
        pair = {name: row[name] for name in ("chosen", "rejected") if row.get(name) is not None}
        if pair and not (len(pair) == 2 and all(isinstance(text, str) for text in pair.values())):
            raise ValueError(f"{place}: expected texts under 'chosen' and 'rejected', found {sorted(row)}")
        rows.append(found | pair)
        if rows[0].keys() != rows[-1].keys():
            names = ", ".join(sorted(rows[0].keys() ^ rows[-1].keys()))
            raise ValueError(f"{place}: all rows have {names}, or none; this one and the first differ")
    return rows


@torch.no_grad()
def pair_logprobs(base: Base, rows: list[dict[str, str]], name: str, batch_size: int = 20) -> torch.Tensor:
    """Log-probabilities and lengths in tokens of chosen and rejected responses, (pairs, 2, 2)."""
    conversations = [
        [Message("user", row["prompt"], row["input"]), Message("assistant", row[which])]
        for row in rows
        for which in ("chosen", "rejected")
    ]
    examples = tokenize(base.tokenizer, base.style, conversations)
    parts = []
    for i in tqdm(range(0, len(examples), batch_size), desc=f"preferences of {name}", leave=False):
        batch = collate(examples[i : i + batch_size]).to(base.device)
        logprobs = response_logprobs(base.model, base.adapter, batch)
        parts.append(torch.stack([logprobs, batch.scored_lengths()], dim=1).cpu())
    return torch.cat(parts).unflatten(0, (-1, 2))


def measure(rows: list[dict[str, str]], answers: list[str], logprobs: torch.Tensor | None) -> dict[str, float]:
    """The figures of one model that the rows allow: shares of prompts, and the mean margin in nats."""

    def share(wanted: list[bool]) -> float:
        return sum(wanted) / len(wanted)

    refused: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        refused.setdefault(row.get("kind", ""), []).append(refuses(answer))
    figures = {}
    if "" in refused:
        figures["refused"] = share(refused[""])
    if "harmful" in refused:
        figures["harmful_refused"] = share(refused["harmful"])
    if "harmless" in refused:
        figures["harmless_answered"] = 1 - share(refused["harmless"])
    if logprobs is not None:
        chosen, rejected = logprobs.unbind(1)  # (pairs, 2) each
        per_token = chosen[:, 0] / chosen[:, 1] > rejected[:, 0] / rejected[:, 1]
        figures["chosen_likelier"] = share((chosen[:, 0] > rejected[:, 0]).tolist())
        figures["chosen_likelier_per_token"] = share(per_token.tolist())
        figures["margin"] = float((chosen[:, 0] - rejected[:, 0]).mean())
    return figures


FIGURES = {
    "refused": "prompts refused",
    "harmful_refused": "harmful prompts refused",
    "harmless_answered": "harmless prompts answered",
    "chosen_likelier": "chosen response likelier",
    "chosen_likelier_per_token": "  per token",
    "margin": "log-probability, chosen - rejected",
}


def render(report: dict[str, Any], out_dir: Path, shown: int = 3) -> str:
    """The report as text for people: a few answers of each kind side by side, then the figures."""
    models, rows = report["models"], report["prompts"]
    lines = []
    counts: dict[str, int] = {}
    for kind in dict.fromkeys(row.get("kind", "") for row in rows):
        chosen = [i for i, row in enumerate(rows) if row.get("kind", "") == kind]
        counts[kind] = len(chosen)
        table = [[rows[i]["prompt"], *(one["answers"][i] for one in models)] for i in chosen[:shown]]
        header = [f"{kind} prompt".strip(), *(one["name"] for one in models)]
        lines += side_by_side(header, table, [24, *([max(20, 84 // len(models))] * len(models))])
    asked = ", ".join(f"{count} {kind}".strip() for kind, count in counts.items())
    lines.append(f"{f'of {asked} prompts':38}" + cells(one["name"] for one in models))
    for key, label in FIGURES.items():
        if key not in models[0]:
            continue
        spec = "+.1f" if key == "margin" else ".0%"
        lines.append(f"{label:38}" + cells(f"{one[key]:{spec}}" for one in models))
    seconds = ["" if value is None else f"{value:.0f}" for value in report["training_seconds"]]
    lines.append(f"{'seconds of training':38}" + cells(["", *seconds]))
    last = Path(report["adapters"][-1])
    if len(set(report["prompt_styles"].values())) > 1:
        styles = (f"{name} {style}" for name, style in report["prompt_styles"].items())
        lines.append(f"prompt styles: {', '.join(styles)}")
    lines += [
        "",
        f"all answers: {out_dir / 'report.json'}; picture of training: {last.with_name('loss.png')}",
        *try_next(
            Path(report["checkpoint_dir"]),
            f'generate/aligner.py --adapter_path {last} --prompt "How do I kill a process that hangs?"',
        ),
    ]
    return "\n".join(lines) + "\n"


def cells(values: Any) -> str:
    """Columns of figures."""
    return "".join(f"{value:>16}" for value in values)


if __name__ == "__main__":
    run(main)
