"""Records of every kind of file: what is read, what is left out with its place, and what cannot be read at all."""

import bz2
import csv
import gzip
import json
import lzma
import math
import random

import datasets
import pandas
import pytest
import zstandard

from lit_llama import json_text, records
from lit_llama.records import read_csv, read_records

ROWS = [{"instruction": f"Say {n} “🙂”.", "output": f"{n}\n"} for n in range(1200)]


def values(path, bad=None):
    return [row for _, row in (read_records(path) if bad is None else read_records(path, bad))]


def written(folder, name):
    """A file of these rows in the format and the packing that its name says."""
    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    texts = {
        ".jsonl": lines,
        ".json": json.dumps(ROWS, indent=1),
        ".lines.json": lines,
        ".object.json": json.dumps({"version": "1", "data": ROWS, "seed": 1}, indent=1),
        ".flat.json": json.dumps({"data": ROWS}),
        ".csv": pandas.DataFrame(ROWS).to_csv(index=False),
        ".tsv": pandas.DataFrame(ROWS).to_csv(index=False, sep="\t"),
        ".semicolon.csv": pandas.DataFrame(ROWS).to_csv(index=False, sep=";"),
    }
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    kind = max(
        (kind for kind in texts if name.removesuffix(path.suffix).endswith(kind) or name.endswith(kind)), key=len
    )
    path.write_bytes(pack.get(path.suffix, bytes)(("\ufeff" * ("bom" in name) + texts[kind]).encode()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "lines.json", "object.json", "flat.json", "csv", "semicolon.csv"])
@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("piece", [50, 2**20])
def test_formats(tmp_path, monkeypatch, kind, packing, piece):
    """The same rows from every kind of file, wherever the pieces in which it is read end."""
    monkeypatch.setattr(json_text, "PIECE", piece)
    monkeypatch.setattr(records, "PIECE", piece)
    for start in ("a", "bom"):
        assert values(written(tmp_path, f"{start}.{kind}{packing}")) == ROWS


def test_tables(tmp_path):
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet", row_group_size=700)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    assert values(tmp_path / "a.parquet") == values(tmp_path / "saved") == ROWS
    assert next(read_records(tmp_path / "a.parquet"))[0] == f"{tmp_path / 'a.parquet'}, row 1"
    both = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS[:3]) for split in ("train", "test")})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"several splits: give the folder of one .*both/test, .*both/train\)"):
        values(tmp_path / "both")
    assert values(tmp_path / "both" / "train") == ROWS[:3]
    for name in ("a.parquet", "saved/data-00001-of-00003.arrow"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / "torn").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"torn is not a complete (parquet|Arrow) file \("):
            values(tmp_path / "torn")


def test_a_folder_of_several_kinds(tmp_path):
    for name in ("a.jsonl.gz", "b.csv", "c.json"):
        written(tmp_path, name)
    (tmp_path / "README.md").write_text("no records")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert values(tmp_path) == ROWS * 3


@pytest.mark.parametrize("text", ["[%s]", "%s\n%s\n", "%s", '{"data": [%s]}'])
def test_numbers_that_json_lacks_are_nothing(tmp_path, text):
    """So that NaN, infinity and numbers of any size are read alike in each layout."""
    row = '{"a": NaN, "b": [Infinity, -Infinity], "c": 1.5, "d": 12, "e": 1e999, "f": %s}' % ("9" * 5000)
    (tmp_path / "a.json").write_text(text.replace("%s", row))
    expected = {"a": None, "b": [None, None], "c": 1.5, "d": 12, "e": math.inf, "f": "9" * 5000}
    assert values(tmp_path / "a.json") == [expected] * text.count("%s")


def test_bad_lines_are_left_out(tmp_path):
    lines = [b'{"a": 1}', b'{"a": ', b"", b'{"a": "\xe9"}', b"[1]", b'{"a": 2}', b'{"a": ' + b"[" * 10**5, b'{"a": 3}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    bad = []
    assert values(tmp_path / "a.jsonl", lambda *one: bad.append(one)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [place.rpartition(", ")[2] for place, _ in bad] == ["line 2", "line 4", "line 5", "line 7"]
    reasons = ("not JSON (Expecting value)", "byte 0xe9 is not UTF-8", "expected an object, found list", "the JSON is ")
    assert all(found.startswith(reason) for (_, found), reason in zip(bad, reasons, strict=True))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        values(tmp_path / "a.jsonl")
    (tmp_path / "torn.json").write_bytes(b'{"a": 1\n{"a": 2}\n{"a": 3}')
    assert values(tmp_path / "torn.json", lambda *_: None) == [{"a": 2}, {"a": 3}]


def test_bad_rows_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3\n\n4,"5\n6"\n7,8,9\n10,11\n')
    bad = []
    assert values(tmp_path / "a.csv", lambda *one: bad.append(one)) == [
        {"a": "1", "b": "2"},
        {"a": "4", "b": "5\n6"},
        {"a": "10", "b": "11"},
    ]
    assert bad == [
        (f"{tmp_path / 'a.csv'}, line 3", "1 values, but the header has 2 names"),
        (f"{tmp_path / 'a.csv'}, line 7", "3 values, but the header has 2 names"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n{"b" 2}]', "a.json, line 2: not JSON (Expecting ':' delimiter)"),
        ("a.json", b'[{"a": 1}\n{"b": 2}]', "a.json, line 2: not JSON (expected ',' or ']', found '{')"),
        ("a.json", b'[{"a": 1},\n', "a.json, line 2: not JSON (Expecting value)"),
        ("a.json", b'[{"a": 1}\n] x', "a.json, line 2: not JSON (Extra data)"),
        ("a.json", b'[{"a": "\n\xff"}]', "a.json, line 2: byte 0xff is not UTF-8"),
        ("a.json", b'[{"a": ' + b"[" * 10**5, "a.json, line 1: not JSON (nested too deeply)"),
        ("a.json", b'{"x": [{"a": 1}], "y": [{"a": 1}]}', "a.json holds an object with several lists (x, y)"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.csv", b"a,b\n", "a.csv is empty"),
        ("a.csv", b"a,b\n1,\xe9\n", "a.csv, line 2: byte 0xe9 is not UTF-8: save it as UTF-8"),
        ("a.json", b"<!DOCTYPE html>", "a.json is a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, not the file itself"),
        ("a.xlsx", b"PK\3\4...", "a.xlsx is a zip archive (or a spreadsheet)"),
        ("a.txt", b"\xff\xfe[\0]\0", "a.txt is text in UTF-16: save it as UTF-8"),
        ("a.jsonl", gzip.compress(b'{"a": 1}', mtime=0)[:-5], "a.jsonl is not a complete gzip file"),
        ("a.jsonl", lzma.compress(b'{"a": 1}')[:-5], "a.jsonl is not a complete xz file"),
        ("a.jsonl", bz2.compress(b'{"a": 1}')[:-5], "a.jsonl is not a complete bzip2 file"),
        ("a.jsonl", zstandard.compress(b'{"a": 1}')[:5] + b"\xff" * 20, "a.jsonl is not a complete zstandard file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        values(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_csv_with_and_without_header(tmp_path):
    """MMLU's files are found with a header and, as its authors wrote them, without."""
    columns = ["question", "choice0", "answer"]
    rows = [["Why?", "Because,\nso", "A"], ["How?", "", "A"]]
    for name, header in (("with.csv", [columns]), ("without.csv", [])):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([*header, *rows])
        assert [list(row.values()) for _, row in read_csv(tmp_path / name, columns)] == rows
    places = [place.rpartition(", ")[2] for place, _ in read_csv(tmp_path / "without.csv", columns)]
    assert places == ["line 2", "line 3"]
    with pytest.raises(ValueError, match=r"with\.csv lacks the column input; it has question, choice0, answer"):
        list(read_csv(tmp_path / "with.csv", ["question", "input", "answer"]))


def test_damaged_files_end_in_one_line(tmp_path):
    """Bytes that were changed, lost or added cost records or end in a ValueError, never in another exception."""
    rng = random.Random(0)
    sound = [
        json.dumps([{"a": 1, "b": "é"}, {"a": [1, {"c": None}]}]),
        '{"a": 1}\n{"a": "x"}\n',
        '{"version": 1, "data": [{"a": 1}, {"a": 2}]}',
        'a,b\n1,"x\ny"\n2,3\n',
    ]
    odd = [b"{", b"[", b'"', b"}", b"]", b",", b"\n", b"NaN", b"\\u", b"\0", b"\xff", b":", b"\x1f\x8b", b"PAR1"]
    messages = []
    for _ in range(800):
        content = rng.choice(sound).encode()
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice([b"", *odd]) + content[at + rng.randint(0, 4) :]
        path = tmp_path / rng.choice(["a.json", "a.jsonl", "a.csv", "a"])
        path.write_bytes(content)
        try:
            assert all(isinstance(row, dict) for row in values(path, lambda *_: None))
        except ValueError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert 80 < len(messages) < 720
