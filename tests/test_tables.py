"""Tables and paragraphs that are too wide for a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parallax_gen.tables import Table, paragraph, table_lines

WORDS = st.lists(st.text("abcxyz_0", min_size=1, max_size=12), max_size=6).map(" ".join)


def test_a_table_that_fits_is_not_folded() -> None:
    table = Table("", ("time", "why"), [("9.5", "it spills registers"), ("10", "")], ("time",))
    lines = ["time  why", " 9.5  it spills registers", "  10"]
    assert table_lines(table) == table_lines(table, 25) == lines
    assert table_lines(table, 24) != lines


def test_cells_are_folded_where_that_adds_the_fewest_lines() -> None:
    """One long config is folded, and not the two words in every row."""
    table = Table("", ("config", "from"), [("M128 w4", "this Triton"), ("M128 N64 w4", "this Triton")])
    assert table_lines(table, 21) == [
        "config    from",
        "M128 w4   this Triton",
        "M128 N64  this Triton",
        "w4",
    ]


def test_the_last_column_stands_below_if_that_takes_fewer_lines() -> None:
    lines = [("forward", "1234", "M128 N64 G8 w8 s3"), ("dkdv", "1234", "M128 N64 G8 w4 s3"), ("sum", "2468", "")]
    assert table_lines(Table("", ("kernel", "us", "config"), lines, ("us",)), 22) == [
        "kernel     us",
        "    config",
        "forward  1234",
        "    M128 N64 G8 w8 s3",
        "dkdv     1234",
        "    M128 N64 G8 w4 s3",
        "sum      2468",
    ]


def test_titles_of_numbers_are_folded_last() -> None:
    table = Table("", ("name", "a time", "a rate"), [("ours", "1.25", "3.75")], ("a time", "a rate"))
    assert table_lines(table, 18) == ["name      a      a", "       time   rate", "ours   1.25   3.75"]


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 3))
def test_no_word_is_lost_or_broken(lines: list[tuple[str, str, str]], width: int, right: int) -> None:
    columns = ("a column", "another", "the last")
    table = Table("", columns, lines, columns[:right])
    folded = table_lines(table, width)
    words = sorted(word for row in (columns, *lines) for cell in row for word in cell.split())
    assert sorted(" ".join(folded).split()) == words
    longest = [max(len(word) for row in (columns, *lines) for word in row[i].split() or [""]) for i in range(3)]
    if sum(longest) + 4 <= width:
        assert max(map(len, folded)) <= width


def test_a_paragraph_is_folded_and_indented() -> None:
    assert paragraph("one two\nthree") == "one two\nthree"
    assert paragraph("one two\nthree", 7) == "one two\nthree"
    assert paragraph("from    one two three", 15, " " * 8) == "from    one two\n        three"
    assert paragraph("a_word_that_is_too_long to fold", 8) == "a_word_that_is_too_long\nto fold"
