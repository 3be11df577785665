"""The built pages: every link leads somewhere, nothing comes from the network, nothing is wider than the screen.

The session `docs` builds them and says where in LONGATTN_SITE; without it these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_public_names import EXPECTED
from tests.workspace import PACKAGES

SITE = Path(os.environ.get("LONGATTN_SITE", "no site"))
WIDTHS = (1400, 390)
HEIGHT = 1800
COLUMNS = {1400: 4, 390: 12}
"""Of a sheet of pictures, for each width; a browser's picture has at most 16384 pixels a side."""
SHOWN = [
    f"{page}.html"
    for page in [
        "index",
        "quickstart",
        "choose-a-pattern",
        "choose-a-schedule",
        "performance",
        "troubleshooting",
        "how/dilated",
        "how/ring",
        "migration",
        "command",
        "api/kernels",
        "adr/index",
    ]
]

pytestmark = pytest.mark.skipif(not SITE.is_dir(), reason="the session `docs` builds the pages and sets LONGATTN_SITE")

# Of each tag, the attribute whose target a browser loads by itself.
LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}


class Page(HTMLParser):
    """What a page links to, what it loads, and which anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values[LOADED[tag]])


@cache
def pages() -> dict[Path, Page]:
    """Every page of the site."""
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


def target_of(path: Path, link: str) -> tuple[Path, str]:
    """The file and the anchor that a link of a page leads to."""
    parts = urlsplit(link)
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_every_link_leads_somewhere() -> None:
    """The file is there, and so is the anchor."""
    anchors = {path.resolve(): page.anchors for path, page in pages().items()}
    dead = []
    for path, page in pages().items():
        for link in {*page.links, *page.loads}:
            if urlsplit(link).scheme in ("http", "https", "mailto", "data"):
                continue
            file, anchor = target_of(path, link)
            if not file.is_file() or (anchor and file.suffix == ".html" and anchor not in anchors[file]):
                dead.append(f"{path.relative_to(SITE)}: {link}")
    assert [] == sorted(dead)


def test_nothing_is_loaded_from_elsewhere() -> None:
    """Scripts, styles, fonts and pictures are the site's own."""
    foreign = [
        f"{path.relative_to(SITE)}: {link}"
        for path, page in pages().items()
        for link in page.loads
        if urlsplit(link).netloc
    ]
    for style in SITE.rglob("*.css"):
        foreign += [
            f"{style.relative_to(SITE)}: {address}"
            for address in re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s]+)", style.read_text(encoding="utf-8"))
            if urlsplit(address).netloc
        ]
    assert [] == foreign


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str) -> None:
    """The reference has an anchor for each."""
    anchors = pages()[SITE / "api" / f"{package}.html"].anchors
    assert [] == [name for name in EXPECTED[package].split() if f"longattn.{package}.{name}" not in anchors]


def test_decisions_come_last_and_are_folded() -> None:
    """The sidebar names them once, at its end; the single pages stand below that entry."""
    sidebar = (SITE / "quickstart.html").read_text(encoding="utf-8").split('class="sidebar-tree"', 1)[1]
    top = re.findall(r'<li class="toctree-l1[^"]*"><a class="reference internal" href="([^"#]+)', sidebar)
    assert top[-1] == "adr/index.html"
    assert [] == [link for link in top if re.match(r"adr/0", link)]


def test_every_wide_thing_scrolls_in_its_own_box() -> None:
    """Without a browser: tables stand in furo's wrapper, and the style lets wrapper, code and pictures stay inside the page."""
    style = (SITE / "_static" / "tables.css").read_text(encoding="utf-8")
    for rule in (
        ".table-wrapper {\n  overflow-x: auto",
        "article pre {\n  overflow-x: auto",
        "img {\n  max-width: 100%",
    ):
        assert rule in style
    for path in pages():
        text = path.read_text(encoding="utf-8")
        wrapped = re.findall(r'<div class="table-wrapper[^"]*">\s*<table', text)
        assert text.count('<table class="docutils') == len(wrapped), path


# Opens every page in a frame of each width, one after another, and reports those that are wider than the frame.
WALK = """<!doctype html><body><script>
const pages = %s, widths = %s, wide = [];
function look(width, page) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.onload = () => {
      const root = frame.contentDocument.documentElement;
      if (root.scrollWidth > root.clientWidth) {
        const box = [...frame.contentDocument.querySelectorAll("article *")].filter(
          e => e.getBoundingClientRect().right > width && !e.closest(".table-wrapper, pre"));
        wide.push(`${page} at ${width}: ${root.scrollWidth} wide; ${box.slice(0, 3).map(e => e.tagName + " " + e.textContent.trim().slice(0, 60))}`);
      }
      frame.remove();
      done();
    };
    frame.src = page;
    document.body.append(frame);
  });
}
(async () => {
  let seen = 0;
  for (const width of widths) for (const page of pages) { await look(width, page); seen++; }
  await fetch("/report", {method: "POST", body: JSON.stringify({seen, wide})});
})();
</script></body>"""


# Pages side by side, as in a window of that width.
SHEET = """<!doctype html><body style="margin:0;display:grid;grid-template-columns:repeat(%d,%dpx)">%s</body>"""


class Walker(SimpleHTTPRequestHandler):
    """Serves the site, the page that walks it and sheets of pages, and takes the report."""

    report: dict[str, object] | None = None
    ready = threading.Event()

    def do_GET(self) -> None:
        """The walking page, a sheet, or a file of the site."""
        if self.path == "/walk":
            names = [f"/{path.relative_to(SITE).as_posix()}" for path in pages()]
            body = (WALK % (json.dumps(names), json.dumps(WIDTHS))).encode()
        elif self.path.startswith("/sheet-"):
            width = int(self.path.removeprefix("/sheet-"))
            frame = '<iframe src="/%s" style="width:%dpx;height:%dpx;border:0"></iframe>'
            frames = "".join(frame % (page, width, HEIGHT) for page in SHOWN)
            body = (SHEET % (COLUMNS[width], width, frames)).encode()
        else:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """What the walk found."""
        Walker.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        Walker.ready.set()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as the base class calls it
        """Silent."""


def browser() -> str | None:
    """A Chromium on this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Walker, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def chromium(folder: Path, *options: str) -> list[str]:
    """The command of a browser without a window; skips where there is none."""
    program = browser()
    if program is None:
        pytest.skip("no Chromium here; apt-get install chromium brings one")
    return [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *options]


def test_nothing_overflows_in_a_browser(tmp_path: Path, address: str) -> None:
    """At 1400 and at 390 pixels no page is wider than the window."""
    command = chromium(tmp_path, "--window-size=1500,1000", "--remote-debugging-port=0", f"{address}/walk")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert Walker.ready.wait(300), "the browser did not end its walk"
    finally:
        process.terminate()
        process.wait(30)
    assert {"seen": len(WIDTHS) * len(pages()), "wide": []} == Walker.report


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_have_pictures(width: int, theme: str, tmp_path: Path, address: str) -> None:
    """Pages side by side, into `screenshots` beside the site, for whoever looks at them: none is empty, and a dark one is dark."""
    image = pytest.importorskip("matplotlib.image")
    picture = SITE.parent / "screenshots" / f"{width}-{theme}.png"
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    columns = COLUMNS[width]
    rows = -(-len(SHOWN) // columns)
    command = chromium(
        tmp_path,
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(theme)}",
        "--hide-scrollbars",
        "--virtual-time-budget=20000",
        f"--window-size={columns * width},{rows * HEIGHT}",
        f"--screenshot={picture}",
        f"{address}/sheet-{width}",
    )
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300, check=True)
    shown = image.imread(picture)[..., :3]
    assert shown.shape[:2] == (rows * HEIGHT, columns * width)
    for place, page in enumerate(SHOWN):
        y, x = place // columns * HEIGHT, place % columns * width
        part = shown[y : y + HEIGHT, x : x + width]
        assert part.std() > 0.03, f"{page} is empty"
        # The page's own margin: plots are white in both.
        assert (part[:, :4].mean() > 0.5) == (theme == "light"), f"{page} is not {theme}"
