"""One HTML file with models' answers side by side, which needs nothing else."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_llama.evaluation.answers import Question
from lit_llama.files import atomic_file

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
  body {{ margin: 0 auto; max-width: {width}rem; padding: 0 1rem 3rem; }}
  header {{ position: sticky; top: 0; background: Canvas; padding: .8rem 0; border-bottom: 1px solid #8886; }}
  header h1 {{ font-size: 1.2rem; margin: 0 0 .4rem; }}
  input, select {{ font: inherit; padding: .2rem .5rem; margin-right: .5rem; }}
  section {{ border-bottom: 1px solid #8886; padding: 1rem 0; }}
  .prompt {{ font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }}
  .category {{ color: GrayText; font-size: .85rem; }}
  .answers {{ display: grid; grid-template-columns: repeat({columns}, minmax(0, 1fr)); gap: 1rem; margin-top: .6rem; }}
  .answers > div {{ border-left: 3px solid #8886; padding-left: .7rem; }}
  .model {{ font-size: .85rem; color: GrayText; }}
  .text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
  @media (max-width: 45rem) {{ .answers {{ grid-template-columns: 1fr; }} }}
</style>
<header>
  <h1>{title}</h1>
  <input id="search" type="search" placeholder="Search prompts and answers" aria-label="Search prompts and answers">
  <select id="category" aria-label="Category"{hidden}><option value="">all categories</option>{options}</select>
  <span id="count"></span>
</header>
<main>
{sections}
</main>
<script>
  const search = document.getElementById("search"), category = document.getElementById("category");
  const sections = [...document.querySelectorAll("section")];
  function show() {{
    const wanted = search.value.toLowerCase();
    for (const section of sections)
      section.hidden = !section.textContent.toLowerCase().includes(wanted)
        || (category.value !== "" && section.dataset.category !== category.value);
    const shown = sections.filter(section => !section.hidden).length;
    document.getElementById("count").textContent = `${{shown}} of ${{sections.length}} prompts`;
  }}
  search.addEventListener("input", show);
  category.addEventListener("change", show);
  show();
</script>
</html>
"""


def write_page(
    path: Path,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int | str, list[str]]],
    title: str,
    pattern: re.Pattern[str] | None = None,
) -> None:
    """Write the page: a section for each question, a column for each model, a search and a choice of categories.

    Args:
        path: where to write the page.
        questions: in their order.
        answers: by model and question, a text for each turn.
        title: title of the page.
        pattern: answers in which it is found are marked.
    """
    categories = dict.fromkeys(question.category for question in questions)
    page = PAGE.format(
        title=html.escape(title),
        width=22 + 26 * len(answers),
        columns=len(answers),
        hidden="" if len(categories) > 1 else " hidden",
        options="".join(f"<option>{html.escape(category)}</option>" for category in categories),
        sections="\n".join(
            section(question, {name: texts[question.id] for name, texts in answers.items()}, pattern)
            for question in questions
        ),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def section(question: Question, answers: dict[str, list[str]], pattern: re.Pattern[str] | None) -> str:
    """A prompt and the answers to it, turn by turn."""
    parts = [f'<section data-category="{html.escape(question.category)}">']
    names = [str(question.id)] + ([question.category] if question.category != "all" else [])
    parts.append(f'<div class="category">{html.escape(" · ".join(names))}</div>')
    for i, turn in enumerate(question.asked):
        parts.append(f'<div class="prompt">{html.escape(turn)}</div><div class="answers">')
        for name, turns in answers.items():
            text = turns[i] if i < len(turns) else ""
            label = html.escape(name) + (" <mark>matches</mark>" if pattern and pattern.search(text) else "")
            parts.append(f'<div><div class="model">{label}</div><div class="text">{html.escape(text)}</div></div>')
        parts.append("</div>")
    return "\n".join([*parts, "</section>"])
