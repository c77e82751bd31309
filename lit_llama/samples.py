"""Answers that are shown while an adapter is trained, next to what was asked and what was wanted."""

import contextlib
import itertools
import textwrap

from lit_llama.data import TokenDataset
from lit_llama.generation import generate
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

NEW_TOKENS = 48
LINES = 3  # of each text


def sample_answers(
    model: LLaMA,
    adapter: Adapter | None,
    tokenizer: Tokenizer,
    style: PromptStyle,
    dataset: TokenDataset,
    with_base: bool = False,
) -> str:
    """Answers to the first two prompts of a data set, for people to read.

    Args:
        model: the base model.
        adapter: as far as it is trained.
        tokenizer: the base's.
        style: prompt style of the data set.
        dataset: examples, or pairs, whose chosen answers are wanted.
        with_base: whether the base model alone answers, too.

    Returns:
        Lines with the user's turn, the answers and the wanted answer of each, without what the template adds.
    """
    indices = range(min(2, len(dataset)))
    prompts = [dataset.prompt(i) for i in indices]
    models = {"base": None, "answer": adapter} if with_base else {"answer": adapter}
    # Without an end, as sharded bases compute in step.
    answers = {name: generate(model, prompts, NEW_TOKENS, adapter=one) for name, one in models.items()}
    shown = []
    for i, prompt in zip(indices, prompts, strict=True):
        ids, scored = dataset[i][0]
        after = scored[len(prompt) :]
        end = len(prompt) + (len(after) if after.all() else int(after.argmin()))
        texts = {
            "user": user_turn(style, tokenizer, prompt),
            **{name: _answer(tokenizer, style, some[i]) for name, some in answers.items()},
            "wanted": _answer(tokenizer, style, ids[len(prompt) : end].tolist()),
        }
        shown += [_paragraph(name, text) for name, text in texts.items()]
    return "\n".join(shown)


def _answer(tokenizer: Tokenizer, style: PromptStyle, ids: list[int]) -> str:
    return style.cut(tokenizer.decode(list(itertools.takewhile(lambda id: id not in style.stop_ids, ids))))


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()) or "(empty)",
        width=100,
        initial_indent=f"    {name + ':':8}",
        subsequent_indent=" " * 12,
        max_lines=LINES,
        placeholder=" ...",
    )


def user_turn(style: PromptStyle, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The user's last turn in a prompt, without what the style writes around it.

    Args:
        style: prompt style.
        tokenizer: that made it.
        prompt: token ids of the text that the assistant continues.

    Returns:
        The turn, or the whole prompt where the style's own text is not found in it.
    """

    def with_markers(ids: list[int]) -> str:
        groups = itertools.groupby(ids, tokenizer.is_special)
        return "".join(
            "".join(map(tokenizer.token, some)) if special else tokenizer.decode(list(some)) for special, some in groups
        )

    mark = "7 questions"
    conversations = [[Message("user", mark)], [Message("user", mark, "what they are about")]]
    conversations.append([Message("user", "a"), Message("assistant", "b"), Message("user", mark)])
    around = []
    for conversation in conversations:
        with contextlib.suppress(ValueError):  # the style may have place for one instruction alone
            text = with_markers(tokenizer.encode(style.render(conversation), bos=style.bos))
            around.append(text.rpartition(mark))
    backwards = zip(*(reversed(before) for before, _, _ in around), strict=False)
    same = [characters[0] for characters in itertools.takewhile(lambda some: len(set(some)) == 1, backwards)]
    opening, ending = "".join(reversed(same)), around[0][2]
    text = with_markers(prompt).removesuffix(ending)
    return text.rpartition(opening)[2] if opening else text
