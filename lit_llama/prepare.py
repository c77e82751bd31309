"""What the scripts that prepare data share: records of any layout in, a tokenised data set out, a report on stderr.

A script brings a function that reads one record; everything else is here.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lit_llama.data import DATASET_FILE, Item, Kind, ScoredTurns, SplitSummary, TooLong, check_window, write_dataset
from lit_llama.files import check_new_folder, require_extra
from lit_llama.prompts import Message, Role
from lit_llama.prompts import prompt_style as get_prompt_style
from lit_llama.records import read_records
from lit_llama.tokenizer import Tokenizer


class LeftOutError(Exception):
    """A record is sound but not wanted; the message says why, and how many share it is reported."""


def prepare(
    read: Callable[[dict[str, Any]], Item],
    kind: Kind,
    scored_turns: ScoredTurns,
    hub_files: tuple[str, Sequence[str]],
    data_path: Path | None,
    *,
    output_dir: Path,
    prompt_style: str,
    validation_share: float,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    max_seq_length: int = 512,
    too_long: TooLong = "truncate",
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Read records, draw a validation split, tokenise, write, and report.

    The records are read twice, to count them and to write them, and never held.

    Args:
        read: one record to its item: a conversation, or the chosen and the rejected one; raises `LeftOutError` for a
            record that is not wanted and `ValueError` for one that is malformed.
        kind: what `read` returns.
        scored_turns: of a conversation's responses, "all" are scored or the "last".
        hub_files: dataset and files on the Hugging Face hub, fetched if there is no `data_path`.
        data_path: JSON or JSON Lines, perhaps gzipped, or a folder of such files.
        output_dir: the folder to write.
        prompt_style: by name.
        validation_share: share of the items drawn for validation.
        checkpoint_dir: folder of the base model, for its tokenizer.
        max_seq_length: window in tokens.
        too_long: "truncate" longer examples at the window's end or "skip" them; either way they are counted.
        seed: of the draw of validation examples.
        overwrite: replace the data set in `output_dir` if there is one.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: an option is out of range, or the data are malformed; the message names the place.
        OSError: the hub cannot be reached.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"--validation_share is {validation_share}, it must lie between 0 and 1")
    if seed < 0:
        raise ValueError(f"--seed is {seed}, it must be at least 0")
    check_window(max_seq_length)
    check_new_folder(output_dir, overwrite, DATASET_FILE)
    tokenizer = Tokenizer(checkpoint_dir)
    style = get_prompt_style(prompt_style, tokenizer)
    paths = [data_path] if data_path else fetch_dataset(*hub_files)
    source = ", ".join(path.name for path in paths)
    reasons: Counter[str] = Counter()

    def items(check_style: bool = False) -> Iterator[Item]:
        reasons.clear()
        for path in paths:
            for place, row in read_records(path):
                try:
                    item = read(row)
                    if not all(conversation[-1].content.strip() for conversation in item):
                        raise LeftOutError("without a response")
                    if not any(message.content.strip() for message in item[0][:-1]):
                        raise LeftOutError("without a prompt")
                    if any(not _is_text(part) for turns in item for message in turns for part in message):
                        raise LeftOutError("with a lone surrogate, which stands for no character")
                    if check_style:
                        for conversation in item:
                            style.segments(conversation, scored_turns)
                except LeftOutError as reason:
                    reasons[str(reason)] += 1
                    continue
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
                yield item

    hashes = [hash(tuple(map(tuple, item))) for item in items(check_style=True)]
    count, different = len(hashes), len(set(hashes))
    if count < 2:
        left_out = "; ".join(f"{number} {reason}" for reason, number in reasons.items())
        raise ValueError(
            f"{source} has {count} usable examples, expected at least 2, one of them for validation"
            + (f" (left out: {left_out})" if left_out else "")
        )
    validation_count = min(max(1, round(validation_share * count)), count - 1)
    drawn = np.zeros(count, dtype=bool)
    drawn[np.random.default_rng(seed).permutation(count)[:validation_count]] = True
    summaries = write_dataset(
        output_dir,
        (("validation" if held_out else "train", item) for held_out, item in zip(drawn, items(), strict=True)),
        tokenizer,
        style,
        max_seq_length,
        too_long,
        source,
        kind=kind,
        scored_turns=scored_turns,
        total=count,
        overwrite=overwrite,
    )
    for reason, number in reasons.items():
        print(f"{number} records left out: {reason}", file=sys.stderr)
    if different < count:
        print(f"{count - different} of {count} examples repeat another one word for word", file=sys.stderr)
    report(output_dir, summaries, "pairs" if kind == "pairs" else "examples")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def report(folder: Path, summaries: dict[str, SplitSummary], items: str = "examples") -> None:
    """Say on stderr what became of the items of each split of a new data set."""
    examples_per_item = 2 if items == "pairs" else 1
    for split, summary in summaries.items():
        tokens = sum(summary.lengths)
        count, scored = len(summary.lengths) // examples_per_item, summary.scored_tokens / tokens
        percentiles = np.percentile(summary.lengths, [5, 50, 95, 100]).astype(int)
        print(
            f"{split}: {count} {items}, {tokens} tokens, {scored:.0%} scored; "
            f"lengths 5%, 50%, 95%, longest: {', '.join(map(str, percentiles))}",
            file=sys.stderr,
        )
        if summary.truncated or summary.skipped:
            print(
                f"{split}: longer than the window: {summary.truncated} truncated, {summary.skipped} left out",
                file=sys.stderr,
            )
    print(f"data set: {folder}", file=sys.stderr)


def fetch_dataset(repo_id: str, names: Sequence[str]) -> list[Path]:
    """Files of a public dataset on the Hugging Face hub, from the local cache if they were fetched before.

    Raises:
        OSError: the hub cannot be reached.
    """
    hub = require_extra("huggingface_hub", "hub")
    try:
        hub.utils.logging.set_verbosity_error()  # its retries are no news
        return [Path(hub.hf_hub_download(repo_id, name, repo_type="dataset")) for name in names]
    except Exception as error:  # of many kinds, depending on the HTTP library under the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the dataset {repo_id} cannot be fetched from the Hugging Face hub ({reason}): "
            f"give a local copy of {', '.join(names)} as --data_path"
        ) from None


def instruction_columns(
    instruction: Sequence[str], response: Sequence[str], input: Sequence[str] = ()
) -> Callable[[dict[str, Any]], Item]:
    """A reader of records with an instruction, perhaps what it is about, and a response, each by its possible names."""

    def read(row: dict[str, Any]) -> Item:
        about = text(row, *input) if any(row.get(name) is not None for name in input) else ""
        return [[Message("user", text(row, *instruction), about), Message("assistant", text(row, *response))]]

    return read


def preference(prompt: Sequence[Message], chosen: str, rejected: str, kind: Kind) -> Item:
    """The item of a preference: the pair, or for supervised tuning the chosen answer alone."""
    if kind == "pairs" and chosen.strip() == rejected.strip():
        raise LeftOutError("chosen and rejected are the same")
    item = [[*prompt, Message("assistant", answer)] for answer in (chosen, rejected)]
    return item if kind == "pairs" else item[:1]


def text(row: Mapping[str, Any], *names: str) -> str:
    """The text that a record has under the first of these names that it knows.

    Raises:
        ValueError: it knows none of them, or has no text there.
    """
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, str):
        raise ValueError(f"expected a text under {' or '.join(map(repr, names))}, found {value!r} in {sorted(row)}")
    return value


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def messages(value: Any, role: Role = "user") -> list[Message]:
    """Messages in OpenAI's layout (`role`, `content`) or ShareGPT's (`from`, `value`).

    Args:
        value: a list of messages, one of them, or a bare text.
        role: whose turn a bare text is.

    Raises:
        ValueError: it is none of these, or a role is unknown.
    """
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, list):
        return [message for one in value for message in messages(one, role)]
    if not isinstance(value, dict):
        raise ValueError(f"expected a text or messages, found {value!r}")
    speaker = text(value, "role", "from")
    if speaker not in _ROLES:
        raise ValueError(f"unknown role {speaker!r}; there are {', '.join(_ROLES)}")
    return [Message(cast(Role, _ROLES[speaker]), text(value, "content", "value"))]
