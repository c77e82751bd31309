"""Put models' answers side by side on a page, for people who would rather look than read tables.

    python evaluate/responses.py --answers_dir out/vicuna

Writes one HTML file that needs nothing else, `responses.html` in --answers_dir: a row for each prompt, a column for
each model, with a search and a choice of categories. The answers are those of `evaluate/vicuna.py`.
"""

import html
from pathlib import Path

from lit_llama.answers import Question, read_folder
from lit_llama.cli import run
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
  <select id="category" aria-label="Category"><option value="">all categories</option>{options}</select>
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


def main(
    answers_dir: Path = Path("out/vicuna"),
    model: list[str] | None = None,
    output_path: Path | None = None,
    title: str = "Answers side by side",
) -> None:
    """Write the page.

    Args:
        answers_dir: questions and answers, from `evaluate/vicuna.py`.
        model: whose answers, in this order; may be given several times; if not given, all that are there.
        output_path: the page; `responses.html` in --answers_dir if not given.
        title: of the page.
    """
    questions, answers = read_folder(answers_dir, model)
    output_path = output_path or answers_dir / "responses.html"
    categories = dict.fromkeys(question.category for question in questions)
    page = PAGE.format(
        title=html.escape(title),
        width=22 + 26 * len(answers),
        columns=len(answers),
        options="".join(f"<option>{html.escape(category)}</option>" for category in categories),
        sections="\n".join(
            section(question, {name: texts[question.id] for name, texts in answers.items()}) for question in questions
        ),
    )
    with atomic_file(output_path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{output_path}: {len(questions)} prompts, {len(answers)} models")


def section(question: Question, answers: dict[str, list[str]]) -> str:
    """A prompt and the answers to it, turn by turn."""
    parts = [f'<section data-category="{html.escape(question.category)}">']
    parts.append(f'<div class="category">{html.escape(str(question.id))} · {html.escape(question.category)}</div>')
    for i, turn in enumerate(question.turns):
        parts.append(f'<div class="prompt">{html.escape(turn)}</div><div class="answers">')
        for name, turns in answers.items():
            text = html.escape(turns[i] if i < len(turns) else "")
            parts.append(f'<div><div class="model">{html.escape(name)}</div><div class="text">{text}</div></div>')
        parts.append("</div>")
    return "\n".join([*parts, "</section>"])


if __name__ == "__main__":
    run(main)
