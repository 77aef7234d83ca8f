"""`report`: the parsed page, and the command's output."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_samples import OTHER_TOOLCHAIN, PLACE, SPEC, config, make_record, run, run_json
from report_samples import HOSTILE, fill, write_bench, write_page

from parallax_gen.codegen.render import render
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name

SECTIONS = ["overview", "tuned", "speed", "roofline", "trials", "knobs", "failures", "kernels"]
VOID = {"meta", "link", "input", "br", "img", "path", "rect", "circle"}


class Page(HTMLParser):
    """Parses a page into its elements with attributes and the text of each section; checks that tags are closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.texts[self._section] = self.texts.get(self._section, "") + data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and all(a.get(n) == v for n, v in attributes.items())]

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [a for _, a in self.elements if name in a.get("class", "").split()]


@pytest.fixture
def page(store: Store, tmp_path: Path) -> Page:
    return Page(write_page(store, tmp_path))


def test_every_section_has_its_figures(page: Page) -> None:
    assert [a["id"] for a in page.all("section")] == SECTIONS
    assert page.of_class("empty") == []
    for state in ("untuned", "predicted", "failed", "elsewhere"):
        assert page.of_class(state), state
    assert len(page.of_class("roofline")) == 2  # one per card; a card outside the table has no peaks
    assert len(page.of_class("history")) == 5  # one per entry with a time, on every card
    assert "num_warps" in page.texts["knobs"]
    assert "1.48" in page.texts["speed"]
    assert "on peaked inputs" in page.texts["speed"]
    assert "The key is at a tenth of the shortest sequence" in " ".join(page.texts["speed"].split())
    assert all(error in page.texts["speed"] for error in ("2.2e-03", "1.6e-03", "2.3e-03"))
    for outcome in ("slow", "resources", "compile", "timeout", "crash", "wrong", "invalid"):
        assert outcome in page.texts["failures"]
    assert "no reason was recorded" in page.texts["failures"]


def test_a_command_is_whole_and_breaks_only_between_words(page: Page) -> None:
    assert "to measure, on the card: parallax-gen tune --refresh" in page.texts["overview"]
    words = "parallax-gen tune --op decode --head-dim 128 --dtype bf16 --shape"
    assert f" {words} " in page.texts["overview"]


def test_links_have_targets(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"].removeprefix("#") for a in page.all("a")}
    assert links - set(ids) == set()
    assert len([a for a in page.of_class("cell") if "href" in a]) == 7  # one per entry


def test_text_from_records_and_files_is_escaped(page: Page) -> None:
    """It creates no element, attribute or script, and the page's policy allows only its own script."""
    assert len(page.all("script")) == 2
    assert page.all("img") == []
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "style"]
    assert HOSTILE in page.texts["failures"]
    assert HOSTILE in page.texts["speed"]
    assert any(HOSTILE in a.get("data-tip", "") for _, a in page.elements)


def test_the_page_loads_no_other_resource(page: Page, tmp_path: Path) -> None:
    addresses = [a[n] for _, a in page.elements for n in ("src", "href", "action", "data", "poster") if n in a]
    assert {address[0] for address in addresses} == {"#", "d"}  # anchors within the page, and the empty icon
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert str(tmp_path) not in text  # the page does not contain local paths


def test_the_same_input_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    first = write_page(store, tmp_path).read_bytes()
    run("report", "--bench", tmp_path / "bench.csv", "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == first


def test_a_kernels_source_is_the_output_of_render(store: Store, tmp_path: Path) -> None:
    store.save(make_record(240.0))
    run("report", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    packed = re.search(r'id="sources">([^<]+)<', page)
    assert packed
    sources = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    ((kinds, texts),) = [(source[::2], source[1::2]) for source in sources]
    assert "".join(texts) == render(SPEC, config(2), gpu_by_name("h200")).text
    assert set(kinds) == {"", "c", "s", "k", "n", "d", "f"}


def test_an_empty_page_says_what_to_do(tmp_path: Path) -> None:
    result = run("report", "--out", tmp_path / "report.html")
    assert result.stdout.startswith(f"{tmp_path / 'report.html'}: 0 measured buckets on no GPU, ")
    page = Page(tmp_path / "report.html")
    assert len(page.of_class("empty")) == len(SECTIONS)
    assert "parallax-gen tune" in page.texts["tuned"]
    assert page.all("figure") == []


def test_a_page_of_shipped_records_explains_the_empty_sections(store: Store, tmp_path: Path) -> None:
    from parallax_gen.memory.shipped import write_shipped

    write_shipped([make_record(250.0)], "h200")
    run("report", "--out", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert len(page.of_class("empty")) == 4  # speed-ups, trials, knobs, failures
    assert "the three fastest of each bucket" in page.texts["trials"]
    assert "shipped" in page.texts["kernels"]


@pytest.mark.parametrize(
    ("numbered", "note"),
    [(0, "order of trials not recorded"), (1, "order of the first 1 not recorded"), (2, "")],
)
def test_a_study_says_if_its_order_is_not_recorded(store: Store, tmp_path: Path, numbered: int, note: str) -> None:
    for n in range(2):
        (store.save_trial if n < numbered else store.save)(make_record(200.0 + n, splits=n + 1))
    run("report", "--out", tmp_path / "report.html")
    text = " ".join(Page(tmp_path / "report.html").texts["trials"].split())
    assert ("Older records have no trial number" in text) == bool(note)
    assert note in text
    assert ("not recorded" in text) == bool(note)


def test_omitted_entries_are_mentioned(store: Store, tmp_path: Path) -> None:
    store.save(make_record(240.0))
    store.save(make_record(230.0, evidence_changes=OTHER_TOOLCHAIN))
    result = run("report", "--out", tmp_path / "report.html")
    assert "entries of other toolchains and kernels left out: 1; --all-environments shows them" in result.stdout
    assert "elsewhere" not in Page(tmp_path / "report.html").texts["kernels"]
    assert "left out" not in run("report", "--all-environments", "--out", tmp_path / "report.html").stdout
    page = Page(tmp_path / "report.html")
    assert "measured, elsewhere" in page.texts["kernels"]
    assert any("triton 3.4 (here " in a.get("data-tip", "") for _, a in page.elements)


def test_json_has_the_data_of_the_figures(store: Store, tmp_path: Path) -> None:
    fill(store)
    write_bench(tmp_path / "bench.csv")
    result = run_json("report", "--bench", tmp_path / "bench.csv", "--gpu", "h200")
    assert result["gpus"] == ["h200"]
    assert sorted(entry["state"] for entry in result["entries"]) == [
        "elsewhere",
        "failed",
        "measured",
        "measured",
        "predicted",
    ]
    here = next(entry for entry in result["entries"] if entry["place"] == PLACE.flat())
    assert here["trials"] == here["outcomes"]["ok"] > 40
    assert here["best"]["rate_unit"] == "GB/s"
    decode = next(kernel for kernel in result["kernels"] if kernel["spec"]["op"] == "decode")
    assert sum(decode["importances"].values()) == pytest.approx(1)
    assert {reason["outcome"] for reason in decode["reasons"]} > {"slow", "wrong"}
    assert result["times_ours"][0]["mean"] == pytest.approx(1.48)
    assert [(row["baseline"], row["error"], row["peaked_error"]) for row in result["largest_errors"]] == [
        ("parallax_gen", 2.2e-3, 1.6e-3),
        ("parallax-kernel CuTeDSL", 2.3e-3, None),
    ]
    assert result["untuned"]
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--gpu", "b400"), "error: unknown GPU 'b400'", 2),
        (("--bench", "empty.csv"), "empty.csv, line 1: got no columns", 1),
        (("--bench", "nowhere.csv"), "error: Invalid value for '--bench': File 'nowhere.csv' does not exist.", 2),
        (("--out", "missing/report.html"), "error: cannot write missing/report.html", 1),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("\r\n", encoding="utf-8")
    result = run("report", *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("report.html").exists()
