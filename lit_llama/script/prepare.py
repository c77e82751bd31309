"""What the scripts that prepare data share: records of any layout in, a tokenised data set out, a report on stderr."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_llama.data import DATASET_FILE, PER_ITEM, Item, Kind, ScoredTurns
from lit_llama.data_writing import SplitSummary, TooLong, check_window, write_dataset
from lit_llama.files import check_new_folder, require_extra
from lit_llama.prompts import PromptStyle, chosen_style
from lit_llama.records import read_records
from lit_llama.script.layouts import Columns, LeftOutError
from lit_llama.tables import counted
from lit_llama.tokenizer import Tokenizer

SHOWN = 3  # records that cannot be used, of which place and reason are said

_ITEMS: dict[Kind, str] = {"supervised": "examples", "pairs": "pairs", "unpaired": "answers"}

Read = Callable[[Columns], Item]


def prepare(
    read: Read,
    kind: Kind,
    scored_turns: ScoredTurns,
    hub_files: tuple[str, Sequence[str]] | None,
    *,
    output_dir: Path,
    prompt_style: str,
    validation_share: float,
    data_path: Path | None = None,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    max_seq_length: int = 512,
    max_response_tokens: int | None = None,
    too_long: TooLong = "truncate",
    seed: int = 1337,
    max_bad_share: float = 0.5,
    strict: bool = False,
    overwrite: bool = False,
) -> None:
    """Read records, draw a validation split, tokenise, write, and report.

    The records are read twice, to count them and to write them, and never held.

    Args:
        read: makes an item of a record: a conversation, or the chosen and the rejected one; raises `LeftOutError` for a
            record that cannot be learned from and `ValueError` for one that is malformed.
        kind: what `read` returns.
        scored_turns: which of a conversation's responses are scored, "all" or the "last".
        hub_files: dataset and files on the Hugging Face hub that are fetched if there is no `data_path`; None if the
            script always has one.
        output_dir: folder to write.
        prompt_style: name of the prompt style.
        validation_share: share of the examples that is kept for validation, drawn at random.
        data_path: file of records: JSON, JSON Lines, CSV (these may be compressed) or parquet; or a folder of such
            files, or one that `save_to_disk` wrote. If it is not given, the public dataset is fetched from the Hugging
            Face hub.
        checkpoint_dir: folder of the base model, whose tokenizer is used.
        max_seq_length: length of the longest example, in tokens.
        max_response_tokens: number of tokens after which a response is cut, without the token that ends it; if not
            given, it is whole. Where preferences differ in the first words, such as those of a refusal, the rest is
            noise.
        too_long: what happens to longer examples: "truncate" cuts their ends off, "skip" leaves them out. Both are
            counted.
        seed: seed of the draw of validation examples.
        max_bad_share: largest share of records that may be unusable (malformed, or without a place in the prompt
            style). They are left out and counted; with more of them, nothing is written.
        strict: stop at the first unusable record.
        overwrite: replace the data set in `--output_dir` if there is one.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: an option is out of range, or the data are malformed; the message names the place.
        OSError: the hub cannot be reached.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"--validation_share is {validation_share}, it must lie between 0 and 1")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"--max_bad_share is {max_bad_share}, it must lie between 0 and 1")
    if max_response_tokens is not None and max_response_tokens < 1:
        raise ValueError(f"--max_response_tokens is {max_response_tokens}, it must be at least 1")
    if seed < 0:
        raise ValueError(f"--seed is {seed}, it must be at least 0")
    check_window(max_seq_length)
    check_new_folder(output_dir, overwrite, DATASET_FILE)
    tokenizer = Tokenizer(checkpoint_dir)
    style = chosen_style(prompt_style, None, tokenizer)
    if data_path is not None:
        paths = [data_path]
    else:
        assert hub_files is not None, "a script that fetches nothing asks for --data_path"
        paths = fetch_dataset(*hub_files)
    source = ", ".join(path.name for path in paths)
    survey = _survey(paths, read, style, scored_turns, strict)
    survey.check(source, max_bad_share)
    count = sum(survey.kept)
    validation_count = min(max(1, round(validation_share * count)), count - 1)
    drawn = np.zeros(count, dtype=bool)
    drawn[np.random.default_rng(seed).permutation(count)[:validation_count]] = True
    summaries = write_dataset(
        output_dir,
        (
            ("validation" if held_out else "train", item)
            for held_out, item in zip(drawn, survey.items(paths, read), strict=True)
        ),
        tokenizer,
        style,
        max_seq_length,
        too_long,
        source,
        kind=kind,
        scored_turns=scored_turns,
        max_response_tokens=max_response_tokens,
        total=None if kind == "unpaired" else count,  # of which a record may have several
        overwrite=overwrite,
    )
    survey.report()
    report(output_dir, summaries, kind)


@dataclass
class _Survey:
    """What becomes of the records of some files.

    Args:
        kept: for each record that could be read, whether it is used.
        left_out: how many records are left out for a reason.
        first: the place of the first of them.
        remarks: what is to be said about records that are used, and of how many it is true.
        bad: how many records are malformed or refused by the prompt style.
        shown: place and reason of the first of them.
    """

    kept: bytearray = field(default_factory=bytearray)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    shown: list[str] = field(default_factory=list)

    def check(self, source: str, max_bad_share: float) -> None:
        """Make sure that enough is left.

        Raises:
            ValueError: it is not.
        """
        total, count = self.bad + self.left_out.total() + sum(self.kept), sum(self.kept)
        first = f"the first: {self.shown[0]}" if self.shown else ""
        if self.bad > max_bad_share * total:
            raise ValueError(
                f"{self.bad} of {total} records of {source} cannot be used, more than --max_bad_share {max_bad_share}; "
                + first
            )
        if count < 2:
            reasons = [f"{number} {reason}" for reason, number in self.left_out.items()]
            reasons += [f"{self.bad} that cannot be used, {first}"] if self.bad else []
            raise ValueError(
                f"{source} has {counted(count, 'usable example')}, expected at least 2, one of them for validation"
                + (f" (left out: {'; '.join(reasons)})" if reasons else "")
            )

    def items(self, paths: Sequence[Path], read: Read) -> Iterator[Item]:
        """Read the records that are used once more."""
        rows = (row for path in paths for _, row in read_records(path, lambda *_: None))
        return (read(Columns(row)) for row, is_kept in zip(rows, self.kept, strict=True) if is_kept)

    def report(self) -> None:
        """Say on stderr what was left out and why."""
        for line in self.shown:
            print(f"left out: {line}", file=sys.stderr)
        if self.bad:
            print(f"{counted(self.bad, 'record')} left out as unusable", file=sys.stderr)
        for reason, number in self.left_out.items():
            print(f"{counted(number, 'record')} left out: {reason} (the first: {self.first[reason]})", file=sys.stderr)
        for remark, number in self.remarks.items():
            print(f"{counted(number, 'record')}: {remark}", file=sys.stderr)


def _survey(paths: Sequence[Path], read: Read, style: PromptStyle, scored_turns: ScoredTurns, strict: bool) -> _Survey:
    """Read all records to see what becomes of each, holding none.

    Raises:
        ValueError: a file cannot be read, or, if this is strict, a record cannot be used.
    """
    survey = _Survey()

    def bad(place: str, reason: str) -> None:
        if strict:
            raise ValueError(f"{place}: {reason}")
        survey.bad += 1
        if len(survey.shown) < SHOWN:
            survey.shown.append(f"{place}: {reason}")

    for path in paths:
        for place, row in read_records(path, bad):
            columns = Columns(row)
            survey.kept.append(False)
            try:
                item = read(columns)
                _check_item(item, scored_turns)
                for conversation in item:
                    style.segments(conversation, scored_turns)
            except LeftOutError as reason:
                survey.left_out[str(reason)] += 1
                survey.first.setdefault(str(reason), place)
            except ValueError as error:
                bad(place, str(error))
            else:
                survey.kept[-1] = True
                survey.remarks.update(columns.remarks())
    return survey


def _check_item(item: Item, scored_turns: ScoredTurns) -> None:
    """Make sure that there is something to learn.

    Raises:
        LeftOutError: there is not.
    """
    if not all(conversation[-1].content.strip() for conversation in item):
        raise LeftOutError("without a response")
    if not any(message.content.strip() for message in item[0][:-1]):
        raise LeftOutError("without a prompt")
    for conversation in item:
        if not _is_text("".join(message.content + message.input for message in conversation)):
            raise LeftOutError("with a lone surrogate, which stands for no character")
        answers = [message for message in conversation if message.role == "assistant"]
        if not any(answer.scored for answer in (answers if scored_turns == "all" else answers[-1:])):
            raise LeftOutError("without a response that is scored: their weight is 0")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def report(folder: Path, summaries: dict[str, SplitSummary], kind: Kind = "supervised") -> None:
    """Say on stderr what became of the items of each split of a new data set."""
    items = _ITEMS[kind]
    for split, summary in summaries.items():
        tokens = sum(summary.lengths)
        count, scored = len(summary.lengths) // PER_ITEM[kind], summary.scored_tokens / tokens
        percentiles = np.percentile(summary.lengths, [5, 50, 95, 100]).astype(int)
        good = f" ({summary.wanted} of them good)" if kind == "unpaired" else ""
        print(
            f"{split}: {count} {items}{good}, {tokens} tokens, {scored:.0%} scored; "
            f"lengths 5%, 50%, 95%, longest: {', '.join(map(str, percentiles))}",
            file=sys.stderr,
        )
        if summary.truncated or summary.skipped:
            print(
                f"{split}: longer than the window: {summary.truncated} truncated, {summary.skipped} left out",
                file=sys.stderr,
            )
        if summary.equal:
            print(
                f"{split}: {counted(summary.equal, 'pair')} left out: chosen and rejected are equal within the window",
                file=sys.stderr,
            )
    _report_repeats(summaries, items)
    print(f"data set: {folder}", file=sys.stderr)


def _report_repeats(summaries: dict[str, SplitSummary], items: str) -> None:
    """Say on stderr how many items repeat another one, and how many answers of validation stand in training."""
    train, validation = (summaries[split] for split in ("train", "validation"))
    count = len(train.items) + len(validation.items)
    repeated = count - len(np.unique(np.concatenate([train.items, validation.items])))
    if repeated:
        print(f"{repeated} of {count} {items} repeat another one word for word", file=sys.stderr)
    answers = int(np.isin(validation.answers, train.answers).sum())
    if answers:
        whole = int(np.isin(validation.items, train.items).sum())
        print(
            f"validation: {answers} of {len(validation.answers)} answers also stand in the training split, {whole} of "
            "them with the same prompt: the validation loss may look better than it is",
            file=sys.stderr,
        )


def fetch_dataset(repo_id: str, names: Sequence[str]) -> list[Path]:
    """Files of a public dataset on the Hugging Face hub, from the local cache if they were fetched before.

    Raises:
        OSError: the hub cannot be reached.
    """
    hub = require_extra("huggingface_hub", "hub")
    require_extra("huggingface_hub.utils.logging", "hub").set_verbosity_error()  # its retries are no news
    try:
        return [Path(hub.hf_hub_download(repo_id, name, repo_type="dataset")) for name in names]
    except Exception as error:  # of many kinds, depending on the HTTP library under the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the dataset {repo_id} cannot be fetched from the Hugging Face hub ({reason}): "
            f"give a local copy of {', '.join(names)} as --data_path"
        ) from None
