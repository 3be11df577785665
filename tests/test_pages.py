"""What pages are made of: files of the repository as pages, tables of rows, figures. `test_site` looks at what is built of them."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiment import experiments
from longattn.attention.cli.parser import build_parser
from longattn.patterncache import Dilated, Full
from tests.workspace import ROOT
from tools.pages import picture
from tools.pages.extension import with_examples, with_joined_names
from tools.pages.figures import FIGURES, counts_of, save, slots_of, work_of
from tools.pages.plots import draw_all
from tools.pages.repository import FOLDERS, SHOWN, page_of, relinked
from tools.pages.rows import NOT_ATTENTION, Measured, measured, processors, records
from tools.pages.tables import TABLES

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_shown_file_has_a_page() -> None:
    """The page is there for Sphinx to read, and so is the file that it shows."""
    assert [] == [page for page in SHOWN if not (DOCS / f"{page}.md").is_file()]
    assert [] == [file for file in [*SHOWN.values(), *FOLDERS] if not (ROOT / file).exists()]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[x](packages/bufmgr/README.md)", "[x](packages/bufmgr.md)"),
        ("[x](docs/adr/0025-rooms.md#context)", "[x](adr/0025-rooms.md#context)"),
        ("[x](benchmarks/results)", "[x](performance.md)"),
        ("[x](LICENSE)", "[x](licence.md)"),
        ("[x](tools/sass.py)", "x (`tools/sass.py`)"),
        ("[x](https://example.org/y)", "[x](https://example.org/y)"),
        ("![x](docs/picture.svg)", "![x](picture.svg)"),
    ],
)
def test_links_of_the_readme_lead_to_pages(link: str, expected: str) -> None:
    """What has a page leads there; a file without one is named."""
    assert expected == relinked(link, "README.md", "readme")


def test_links_are_said_from_the_page() -> None:
    """From a folder of pages they go up."""
    assert "[x](../attention/transformers.md)" == relinked(
        "[x](../../docs/attention/transformers.md)", "packages/attention/README.md", "packages/attention"
    )


def test_links_of_files_lead_to_files() -> None:
    """Whoever reads in the repository finds each target; figures are drawn when the pages are built, and `test_site` finds those."""
    dead = []
    for file in (*SHOWN.values(), *(path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md")))):
        if "_build" in Path(file).parts or page_of(file) is None:
            continue
        for target in re.findall(r"(?<!!)\]\(([^)\s#]+)[^)]*\)", (ROOT / file).read_text(encoding="utf-8")):
            if "://" not in target and "_figures/" not in target and not (ROOT / file).parent.joinpath(target).exists():
                dead.append(f"{file}: {target}")
    assert [] == dead


def test_every_table_is_asked_for_by_a_name_it_has() -> None:
    """Pages name tables that exist, and none is made for nobody."""
    named = {
        name
        for path in DOCS.rglob("*.md")
        for name in re.findall(r"^```\{rows\} (.+)$", path.read_text(encoding="utf-8"), re.M)
    }
    assert set(TABLES) == named


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_rows(name: str) -> None:
    """Every line of a table has as many cells as its head."""
    lines = [line for line in TABLES[name]().splitlines() if line.startswith("|")]
    assert len(lines) > 2
    width = 0
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if set(after) <= set("| -") and after:
            width = line.count("|")
        assert width == line.count("|"), line


def test_the_newest_row_counts() -> None:
    """Each experiment is there once on each processor, and early rows of a shared name are kept apart by their day."""
    rows = measured("host", "planning")
    assert len(rows) == len({row.experiment for row in rows})
    assert all(row.date in row.processor for row in rows if "not recorded" in row.processor)
    dates = [max(row.date for row in rows if row.processor == name) for name in processors(rows)]
    assert dates == sorted(dates, reverse=True)


def test_a_choice_is_a_comparison() -> None:
    """The row that a call takes, beside dense attention, by the same ratio as everywhere."""
    row: Measured = next(row for row in measured("choice") if row.variant.startswith("window 64"))
    assert ("dense", round(row.peer_ms / row.ours_ms, 3)) == (row.peer, row.ratio)


def test_examples_in_docstrings_are_marked() -> None:
    """An indented block after a paragraph is code; sections, lists and blocks that say so themselves are left alone."""
    plain = [
        "Says it.",
        "",
        "    x = 1",
        "    y = 2",
        "",
        "Args:",
        "    x: a number",
        "        of any size.",
        "",
        "Code::",
        "",
        "    z",
    ]
    assert ["Says it.", "", ".. code-block:: python", "", "    x = 1", *plain[3:]] == with_examples(plain)
    assert plain[4:] == with_examples(plain[4:])


def test_names_of_one_description_stay_together() -> None:
    """The last of them is no name with the others for a type."""
    lines = [":ivar heads, head_dim: of q; of k", ":ivar out: of a, b", "heads, out: not a field"]
    assert [":ivar heads,\N{ZERO WIDTH SPACE}head_dim: of q; of k", *lines[1:]] == with_joined_names(lines)


def test_plots_are_of_other_computations() -> None:
    """No bar is a share of our own time."""
    assert {row.peer for row in measured("windows")} & NOT_ATTENTION
    labels = [text.get_text() for name, plot in draw_all() for text in plot.axes[0].get_yticklabels()]
    assert [] == [text for text in labels if text.endswith(tuple(f"| {peer}" for peer in NOT_ATTENTION))]


def test_figures_show_counts() -> None:
    """A cell is a count, of the head that is named."""
    pattern = Dilated((16,), (4,), causal=True)
    shown = counts_of(pattern, 32, head=3)
    queries, keys = np.nonzero(shown)
    assert {3} == set(queries % 4) | set(keys % 4)
    assert (shown == pattern.to_dense(32)[3]).all()


def test_figures_show_work() -> None:
    """Zigzag shards have equal work; the last of contiguous ones has most."""
    assert np.allclose(work_of(Full(causal=True), 64, 4, "zigzag").sum(axis=1), 1, atol=0.01)
    assert work_of(Full(causal=True), 64, 4, "contiguous").sum(axis=1).argmax() == 3


def test_figures_show_slots() -> None:
    """Sinks stay, the last tokens go around."""
    held = slots_of(capacity=6, sinks=2, tokens=14)
    assert [0, 1] == held[-1, :2].tolist()
    assert list(range(8, 14)) == sorted(held[-1, 2:].tolist())


def test_everything_can_be_drawn(tmp_path: Path) -> None:
    """Each figure and plot is an SVG, the same bytes again."""
    for name, figure in FIGURES.items():
        save(figure(), tmp_path / f"{name}.svg")
    save(FIGURES["islands"](), tmp_path / "again.svg")
    assert (tmp_path / "islands.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    names = [name for name, _ in draw_all()]
    assert len(names) == len(set(names)) > 3
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")) + TABLES["performance"]()
    assert [] == [name for name in [*FIGURES, *names] if f"_figures/{name}.svg" not in pages]


def test_the_readme_picture_is_drawn() -> None:
    """`python -m tools.pages.picture` writes it; it is the same in every byte."""
    assert picture.FILE.read_text(encoding="utf-8") == picture.picture()


TOLD = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "packages").glob("*/README.md"))
}
RATIO = re.compile(r"^\| (.+) \| ([\d.]+)x \| (AMD .+|Intel .+) \| `bench (\w+) (.+)` \|$", re.M)
FIGURE = re.compile(r"^\| (.+) \| (.+) \| ([\d.]+) \| `([\w-]+-figures)` \|$", re.M)
MEASURED = [found for text in TOLD.values() for found in RATIO.findall(text)]
FIGURED = [found for text in TOLD.values() for found in FIGURE.findall(text)]


@pytest.mark.parametrize(("what", "ratio", "processor", "case", "options"), MEASURED)
def test_ratios_of_the_readmes_are_rows(what: str, ratio: str, processor: str, case: str, options: str) -> None:
    """Each is the newest row of an experiment that its command runs, on the processor that it names; so is a time of ours that is told with it."""
    texts = re.findall(r"--only (\S+)", options)
    asked = [one.labels for one in experiments(case, quick=False) if all(text in one.key for text in texts)]
    named = {(label.variant, label.peer, label.dtype, label.seq_len, label.causal, label.direction) for label in asked}
    rows = [
        row
        for row in measured(case)
        if (row.variant, row.peer, row.dtype, row.seq_len, row.causal, row.direction) in named
        and row.processor == processor
        and ratio == f"{row.ratio:.2f}"
    ]
    assert rows
    assert all(str(row.seq_len) in what and ("backward" in row.direction) == ("backward" in what) for row in rows)
    for time in re.findall(r"([\d.]+) (?:ns|us|ms)\b", what):
        assert all(time == f"{row.ours_ms:.{len(time.partition('.')[2])}f}" for row in rows)


@pytest.mark.parametrize(("name", "setting", "value", "file"), FIGURED)
def test_figures_of_the_readmes_are_rows(name: str, setting: str, value: str, file: str) -> None:
    """The newest of that name and setting: the last, as rows are added at the end."""
    rows = [row for row in records(file) if (row["name"], row["setting"]) == (name, setting)]
    assert rows
    assert value == f"{float(rows[-1]['ours']):.{len(value.partition('.')[2])}f}"


def test_the_readme_has_four_ratios() -> None:
    """Four, and one of them is a loss."""
    ratios = [float(ratio) for _, ratio, _, _, _ in RATIO.findall(README)]
    assert len(ratios) == 4
    assert min(ratios) < 1


def test_commands_on_the_pages_parse() -> None:
    """Each `longattn ...` line of a shell block is one that the command takes."""
    lines = [
        line.removeprefix("longattn ")
        for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("longattn ")
    ]
    assert len(lines) >= 8
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True))
