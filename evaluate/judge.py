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
from pathlib import Path
from typing import Literal

from lit_llama.evaluation.answers import Question, read_folder
from lit_llama.evaluation.judging import Case, Judge, estimate, judge_all
from lit_llama.evaluation.statistics import bootstrap, in_words
from lit_llama.files import atomic_file, require_extra
from lit_llama.script.command_line import run

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
    dry_run: bool = False,
    temperature: float | Literal["none"] = 0.7,
    max_tokens: int = 512,
    workers: int = 4,
    requests_per_minute: float | None = None,
    timeout: float = 60.0,
    retries: int = 6,
    input_price: float = 0.0,
    output_price: float = 0.0,
) -> None:
    """Judge.

    Args:
        judge_model: name of the judge at the endpoint.
        answers_dir: questions and answers, from `evaluate/vicuna.py`.
        model: the two to compare, the one whose wins are counted first; if not given, the only two that are there.
        repeats: rounds for each question, each of two requests.
        dry_run: say how many requests and tokens it would take, and send nothing.
        temperature: of the judge; repeats need one above 0. "none" leaves it to the endpoint; it is left out, too,
            where the endpoint refuses it.
        max_tokens: longest judgement, in tokens; a judge that thinks first needs thousands, as its thoughts count.
        workers: requests at once.
        requests_per_minute: at most; if not given, as fast as answers come.
        timeout: seconds until a request is tried again.
        retries: of a request that fails, with growing pauses.
        input_price: of the judge, US dollars for a million tokens, for the estimate.
        output_price: likewise, for what it writes.
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
    sampled = None if temperature == "none" else temperature
    judge = Judge(judge_model, sampled, max_tokens, workers, requests_per_minute, timeout, retries)
    print(estimate(cases, path, judge, input_price, output_price), file=sys.stderr)
    if dry_run:
        return
    judged = judge_all(cases, path, judge, read_verdict)
    unread = sum(verdict is None for _, verdict in judged)
    preferred = {(case.key["question_id"], case.key["repeat"], case.key["first"]): verdict for case, verdict in judged}

    outcomes: dict[int | str, int] = {}
    for question in questions:
        rounds = []
        for repeat in range(repeats):
            pair = preferred[question.id, repeat, first], preferred[question.id, repeat, second]
            if None not in pair:
                rounds.append(1 if pair == ("1", "2") else -1 if pair == ("2", "1") else 0)
        if rounds:
            outcomes[question.id] = (sum(rounds) > 0) - (sum(rounds) < 0)
    if not outcomes:
        raise ValueError(
            f"no judgement could be read, see {path}: does {judge_model} follow instructions, "
            "and is --max_tokens enough for it?"
        )
    disagree = sum(
        preferred[question.id, repeat, first] == preferred[question.id, repeat, second] in ("1", "2")
        for question in questions
        for repeat in range(repeats)
    )
    categories = list(dict.fromkeys(question.category for question in questions))
    table = {c: [outcomes[q.id] for q in questions if q.category == c and q.id in outcomes] for c in categories}
    table = {category: found for category, found in table.items() if found}
    if len(table) > 1:
        table["all"] = list(outcomes.values())
    print(f"{first} against {second}, judged by {judge_model}, {repeats} rounds in both orders\n")
    print("| category | wins | ties | losses | score | 95% interval |\n|---|---:|---:|---:|---:|---|")
    for category, found in table.items():
        points = [(outcome + 1) / 2 for outcome in found]
        interval = in_words(bootstrap(points), ".3f")
        counts = " | ".join(str(found.count(outcome)) for outcome in OUTCOMES)
        print(f"| {category} | {counts} | {sum(points) / len(points):.3f} | {interval} |")
    print(f"\nThe judge took the same place in both orders in {disagree} of {len(questions) * repeats} rounds.")
    if unread:
        print(f"{unread} judgements hold no verdict, and their rounds do not count; another run asks again.")
    plot(table, f"{first} against {second}", path.with_suffix(".png"))
    print(f"picture: {path.with_suffix('.png')}", file=sys.stderr)


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


def plot(table: dict[str, list[int]], title: str, path: Path) -> None:
    """A bar for each category, of its shares of wins, ties and losses."""
    figure = require_extra("matplotlib.figure", "plot").Figure(
        figsize=(8, 1.2 + 0.4 * len(table)), layout="constrained"
    )
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
    axes.set(xlim=(0, 1), xlabel="share of questions", title=title)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    run(main)
