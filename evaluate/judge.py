"""Which of two models answers better? A language model judges each pair of answers, in both orders.

    export OPENAI_API_KEY=... OPENAI_BASE_URL=https://api.openai.com/v1
    python evaluate/judge.py --judge_model gpt-4o --dry_run
    python evaluate/judge.py --judge_model gpt-4o --answers_dir out/vicuna --model aligned --model base

Any endpoint that speaks OpenAI's chat-completions API will do, `generate/serve.py` too. The answers are those of
`evaluate/vicuna.py`. A model wins a round if the judge prefers it in both orders; if the orders disagree, it is a tie,
which takes away what a judge gives to a place. The winner of a question is who wins more of its rounds. The score is
the Aligner paper's (arXiv 2312.05503), (wins + ties / 2) / questions, with a 95% bootstrap interval over questions.

Writes every judgement to `judgements/MODEL-vs-OTHER.jsonl` in --answers_dir as it comes, and the same command goes on
where it was interrupted; `judgements/MODEL-vs-OTHER.png` shows wins, ties and losses by category.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.evaluation.answers import Question, read_folder
from lit_llama.evaluation.judging import Case
from lit_llama.evaluation.statistics import bootstrap, in_words
from lit_llama.figures import picture
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import judged
from lit_llama.tables import markdown

SYSTEM = """\
Two assistants were given the same request. Say which of them served the user better. Weigh whether the answer is \
correct, does what was asked, is complete and clear. Do not reward length, confidence or polish for their own sake, \
and do not let the order in which the answers stand count: it was drawn by lot. First compare them in a few \
sentences. Then end with a line that holds nothing but your verdict: "Verdict: 1" if the first answer is better, \
"Verdict: 2" if the second is, "Verdict: tie" if neither is."""
OUTCOMES = {1: "win", 0: "tie", -1: "loss"}


def main(
    judge_model: str,
    answers_dir: Path = Path("out/vicuna"),
    model: list[str] | None = None,
    repeats: int = 3,
    **options: Any,
) -> None:
    """Judge.

    Args:
        judge_model: name of the judge at the endpoint.
        answers_dir: folder of questions and answers, from `evaluate/vicuna.py`.
        model: name of one of the two models to compare, given twice: first the one whose wins are counted; if not
            given, the only two that there are.
        repeats: number of rounds for each question, each of two requests.
        options: those of every judge, see `judged`.
    """
    questions, answers = read_folder(answers_dir, model)
    if len(answers) != 2 or repeats < 1:
        raise ValueError(f"give two models by --model, and --repeats of at least 1; there are {', '.join(answers)}")
    first, second = answers
    cases = []
    for question in questions:
        for repeat in range(repeats):
            for order in ((first, second), (second, first)):
                key = {"question_id": question.id, "repeat": repeat, "first": order[0], "second": order[1]}
                texts = [answers[name][question.id] for name in order]
                cases.append(Case(key, SYSTEM, show(question, texts)))
    path = answers_dir / "judgements" / f"{first}-vs-{second}.jsonl"
    found = judged(judge_model, {path: cases}, read_verdict, **options)
    if found is None:
        return
    preferred = {(case.key["question_id"], case.key["repeat"], case.key["first"]): text for case, text in found[path]}
    rounds = {
        question.id: [(preferred[question.id, n, first], preferred[question.id, n, second]) for n in range(repeats)]
        for question in questions
    }
    table = by_category(questions, {id: outcome(some) for id, some in rounds.items()})
    print(f"{first} against {second}, judged by {judge_model}, {repeats} rounds in both orders\n")
    print(render(table))
    every = [pair for some in rounds.values() for pair in some]
    disagree = sum(pair in (("1", "1"), ("2", "2")) for pair in every)
    print(f"\nThe judge took the same place in both orders in {disagree} of {len(every)} rounds.")
    unread = sum(verdict is None for pair in every for verdict in pair)
    if unread:
        print(f"{unread} judgements hold no verdict, and their rounds do not count; another run asks again.")
    draw(table, f"{first} against {second}, judged by {judge_model}", path.with_suffix(".png"))
    print(f"picture: {path.with_suffix('.png')}", file=sys.stderr)


def outcome(rounds: Sequence[tuple[str | None, str | None]]) -> int | None:
    """1 if the first model wins more of a question's rounds than it loses, -1 if fewer, 0 if as many.

    Args:
        rounds: the verdicts with the first model's answer in the first place, and in the second.

    Returns:
        None if no round has both verdicts.
    """
    points = [1 if pair == ("1", "2") else -1 if pair == ("2", "1") else 0 for pair in rounds if None not in pair]
    return (sum(points) > 0) - (sum(points) < 0) if points else None


def by_category(questions: Sequence[Question], outcomes: Mapping[int | str, int | None]) -> dict[str, list[int]]:
    """The outcomes of each category's questions, and of all together.

    Raises:
        ValueError: there is none.
    """
    table: dict[str, list[int]] = {}
    for question in questions:
        found = outcomes[question.id]
        if found is not None:
            table.setdefault(question.category, []).append(found)
    if not table:
        raise ValueError("there is no round whose judgements can both be read: is --max_tokens enough for the judge?")
    return table if len(table) == 1 else table | {"all": [found for some in table.values() for found in some]}


def render(table: dict[str, list[int]]) -> str:
    """The table in Markdown."""
    rows = []
    for category, found in table.items():
        points = [(outcome + 1) / 2 for outcome in found]
        counts = [found.count(outcome) for outcome in OUTCOMES]
        rows.append([category, *counts, f"{sum(points) / len(points):.3f}", in_words(bootstrap(points), ".3f")])
    return markdown(["category", "wins", "ties", "losses", "score", "95% interval"], rows)


def show(question: Question, answers: list[list[str]]) -> str:
    """The request and the two answers as the judge sees them, conversations turn by turn."""
    parts = ["# The request", *question.asked]
    for label, turns in zip(("first", "second"), answers, strict=True):
        parts += [f"# The {label} answer", "\n\n(next turn)\n\n".join(turns)]
    return "\n\n".join(parts)


def read_verdict(text: str) -> str | None:
    """ "1", "2" or "tie", from the last line that says so."""
    found = re.findall(r"^\W*verdict\W*(1|2|tie)\b\W*$", text, re.IGNORECASE | re.MULTILINE)
    return found[-1].lower() if found else None


def draw(table: dict[str, list[int]], title: str, path: Path) -> None:
    """Draw a bar for each category, of its shares of wins, ties and losses."""
    with picture(path, title, 8, 1.5 + 0.4 * len(table)) as figure:
        axes = figure.subplots()
        names = [f"{category} ({len(found)})" for category, found in table.items()]
        left = [0.0] * len(table)
        for (outcome, label), color in zip(OUTCOMES.items(), ("#2a9d8f", "#cccccc", "#e76f51"), strict=True):
            shares = [found.count(outcome) / len(found) for found in table.values()]
            bars = axes.barh(names, shares, left=left, color=color, label=label)
            counts = [str(found.count(outcome) or "") for found in table.values()]
            axes.bar_label(bars, counts, label_type="center", fontsize="small")
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of questions")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    run(main)
