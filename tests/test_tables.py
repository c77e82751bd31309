"""Tables as Markdown shows them."""

from lit_llama.tables import markdown, side_by_side


def test_markdown():
    """Numbers stand on the right; a bar within a cell does not end it; a column without a cell is one of texts."""
    rows = [["a|b", 1200, "", "+1.0% to +2.0%"], ["c", "1,300", "", ""]]
    assert markdown(["name", "count", "note", "interval"], rows).splitlines() == [
        "| name | count | note | interval |",
        "|---|---:|---|---:|",
        "| a\\|b | 1200 |  | +1.0% to +2.0% |",
        "| c | 1,300 |  |  |",
    ]
    assert markdown(["name"], []) == "| name |\n|---|"


def test_texts_are_wrapped_in_columns():
    lines = side_by_side(["prompt", "answer"], [["one two three", "yes"]], [8, 6])
    assert lines == ["prompt    answer", "--------  ------", "one two   yes", "three", ""]
