"""The report page (page.html.j2, page.css) is complete, self-contained and escaped, and fits the window of a real browser."""

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from icar_jax.data.images import ImageError
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.records import Record, Source
from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.comparison import Comparison
from icar_jax.evaluation.metrics.retrieval import Ranks, summarise
from icar_jax.evaluation.records.retrieval import (
    Difference,
    ExitFlops,
    Flops,
    FrontierPoint,
    GalleryCounts,
    QueryCounts,
    RetrievalEvaluation,
    Run,
)
from icar_jax.evaluation.report import report, report_figures
from icar_jax.evaluation.report.page import RankDrop
from icar_jax.evaluation.routing import timing
from icar_jax.evaluation.routing.gallery import Evidence, Gallery

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
EVIL = "<script>alert('x')</script> & \"quotes\""
N = 40
RUNS = ("full", "exit_2", "exit_4", "static", "routed", "budget_0.6", "random", "oracle", "lossless")


class Pictures(Source):
    """A source of small images, of which the fourth can no longer be read."""

    name = f"pictures {EVIL}"

    def __len__(self):
        return N

    def __getitem__(self, i):
        def image():
            if i == 3:
                raise ImageError("gone")
            return Image.new("RGB", (90, 60), (i * 6, 90, 120))

        return Record(f"{i} {EVIL}.jpg", image, (f"caption {i} {EVIL}", "b"))


def ranks_of(rng, worst):
    return Ranks(rng.integers(1, worst, 2 * N), rng.integers(1, worst, N), np.repeat(np.arange(N), 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(record, evidence, folder) of a synthetic evaluation with every kind of run."""
    rng = np.random.default_rng(0)
    interval = Interval(97.0, 93.0, 101.0)
    exits = rng.choice([2, 4, 6], N)
    found = {name: ranks_of(rng, 30 if name == "full" else 200) for name in RUNS}
    runs = {}
    for i, name in enumerate(RUNS):
        compared = Comparison(interval, None, interval)
        runs[name] = Run(
            **summarise(found[name]), flops_per_image=1e9 - 1e7 * i, share={2: 0.3, 4: 0.3, 6: 0.4},
            images_per_s=None if name in ("oracle", "lossless") else 100.0 + i,
            retention=None if name == "exit_2" else interval, intervals={"mean": dict.fromkeys(("r1", "r5", "r10"), compared)},
        )  # fmt: skip
    record = RetrievalEvaluation(
        runs=runs,
        gallery=GalleryCounts(N, 2 * N, QueryCounts(N, 2 * N), Pictures.name),
        comparisons={"routed_minus_random": Difference(1.0, -1.0, 3.0, True)},
        timing=timing.Timing(
            N, 3, 3.0, 0.5, {2: 1.0, 4: 2.0, 6: 3.0}, 0.4, 0.9, timing.Padding(4, 0.2, 0.3), compile_s=2.0, programs=7
        ),
        flops=Flops({2: ExitFlops(3e8, 3.1e8)}, 1e7, 1e7),
        frontier=[FrontierPoint((t, t), {}, {"counted": t, "measured": t}, 50 * t, 100 * t) for t in (0.5, 0.8, 1.0)],
        notes=[f"A note {EVIL}"],
    )
    source = Pictures()
    gallery = Gallery(
        by_exit=dict.fromkeys((2, 4, 6), np.zeros((N, 2), np.float32)), texts=np.zeros((2 * N, 2), np.float32),
        caption_image=np.repeat(np.arange(N), 2), routed=None, scores=rng.random(N).astype(np.float32), exits=exits,
        sample=timing.Sample(np.zeros((1, 8, 8, 3), np.uint8), None), captions=[source[i].captions for i in range(N)],
        bad=BadFiles(), names=[source[i].name for i in range(N)], index=np.arange(N), labels=[()] * N,
    )  # fmt: skip
    evidence = Evidence(gallery, {name: found[name] for name in RUNS if name not in ("random", "static")})
    evidence.exits.update(routed=exits, full=np.full(N, 6), exit_2=np.full(N, 2), exit_4=np.full(N, 4))
    folder = tmp_path_factory.mktemp("report")
    report.write_report(record, evidence, source, folder, title=f"run {EVIL}")
    return record, evidence, folder


class Reader(HTMLParser):
    """Collects text, tags and attributes; checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def page(made):
    text = (made[2] / "index.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return text, reader


def test_every_run_has_a_row_and_headers_have_scopes(page):
    _, reader = page
    heads = [attrs for tag, attrs in reader.tags if tag == "th"]
    assert all(attrs.get("scope") in ("row", "col") for attrs in heads)
    words = " ".join(reader.words)
    for name in ("full", "exit 2", "exit 4", "static", "routed", "budget 0.6", "random", "oracle", "lossless"):
        assert name in reader.words, name
    for part in ("decode", "preprocessing", "router", "tower, 4 blocks", "padding", "text, per caption", "7 programs"):
        assert part in words, part
    assert "includes 100" in words and "undefined" in words and "20% of the rows" in words


def test_no_external_resources_and_no_unescaped_text(page, made):
    text, reader = page
    assert "<script" not in text
    for what in ("run", "pictures", "A note"):  # the title, the source and the notes
        assert any(f"{what} {EVIL}" in word for word in reader.words), what
    drops = [attrs["alt"] for tag, attrs in reader.tags if tag == "img" and attrs["alt"].startswith("image ")]
    assert drops and all(alt.endswith(f"{EVIL}.jpg") for alt in drops)
    for _, attrs in reader.tags:
        for key in ("src", "href", "srcset"):
            assert attrs.get(key, "data:").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme:dark" in style
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


def test_every_image_has_alternative_text(page):
    _, reader = page
    alts = [attrs.get("alt") for tag, attrs in reader.tags if tag == "img"]
    assert len(alts) > 5 and all(alts)
    assert any("routed retains 97.0% at" in alt for alt in alts)


def test_figures_and_metrics_are_files_too(made):
    record, _, folder = made
    assert json.loads((folder / "metrics.json").read_text())["notes"] == record.notes
    names = sorted(path.stem for path in (folder / "figures").iterdir())
    assert names == ["kept_counted", "kept_measured", "rank_change", "recall_by_complexity", "share_by_complexity"]
    for path in (folder / "figures").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 5, f"{path} is blank"


def test_the_largest_rank_drops_come_first(made, page):
    _, evidence, _ = made
    found = report._rank_drops(evidence, Pictures())
    assert 0 < len(found) <= report.RANK_DROPS
    falls = [fall.after - fall.before for fall in found]
    assert falls == sorted(falls, reverse=True) and min(falls) > 0 and all(fall.exit < 6 for fall in found)
    full, run = evidence.ranks["full"], evidence.ranks["routed"]
    early = evidence.exits["routed"] < 6
    change = np.concatenate([(run.text_to_image - full.text_to_image)[early[full.caption_image]],
                             (run.image_to_text - full.image_to_text)[early]])  # fmt: skip
    assert falls[0] == change.max()
    for fall in found:
        assert (fall.thumbnail is None) == fall.name.startswith("3 ")


def test_rank_changes_are_of_the_images_that_left_early(made):
    _, evidence, _ = made
    changes = report.rank_changes(evidence)
    assert set(changes) == {2, 4}
    assert len(changes[2]) == 3 * int(np.sum(evidence.exits["routed"] == 2))
    found = report_figures.change_shares(np.array([-150, -100, -99, -10, -9, -1, 0, 1, 9, 10, 99, 100, 150]))
    assert (found * 13).round().astype(int).tolist() == [2, 2, 2, 1, 2, 2, 2]


def test_padding_counts_unused_rows():
    # 9 images at exit 2 in batches of 8: a full batch and a single row. 3 images at exit 6: three single rows.
    tower_ms = {2: 1.0, 6: 4.0}
    assert timing.padding(np.array([2] * 9 + [6] * 3), tower_ms, 8) == timing.Padding(0, 0.0, 0.0)
    found = timing.padding(np.array([2] * 6), tower_ms, 8)
    assert found.rows == 2 and found.share == 0.25 and found.ms == pytest.approx(2 / 6)


def browser(*arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.check
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_real_browser(made, tmp_path, width):
    """Shows the page in a frame of that width, since headless windows are at least 500 pixels wide."""
    text = (made[2] / "index.html").read_text(encoding="utf-8")
    probe = (
        "<script>addEventListener('load',()=>{const d=document.documentElement;"
        "document.querySelectorAll('details').forEach(e=>e.open=true);parent.postMessage({width:d.scrollWidth,"
        "broken:[...document.images].filter(i=>!i.naturalWidth).length,rows:[...document.querySelectorAll('tbody th')]"
        ".map(e=>e.firstChild.textContent),paper:getComputedStyle(document.body).backgroundColor},'*')})</script></body>"
    )
    frame = html.escape(text.replace("</body>", probe), quote=True)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<body><iframe style='width:{width}px;height:3000px;border:0' srcdoc=\"{frame}\"></iframe><pre id='found'></pre>"
        "<script>addEventListener('message',e=>{found.textContent=JSON.stringify(e.data)})</script></body>"
    )
    papers = set()
    for scheme in (0, 1):  # dark, light
        dom = browser(
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1500,3000", "--virtual-time-budget=8000",
            "--dump-dom", outer.as_uri(),
        )  # fmt: skip
        found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
        assert found["width"] <= width, "scrolls sideways"
        assert found["broken"] == 0
        assert {"full", "exit 2", "routed", "budget 0.6", "random", "oracle", "lossless", "static"} <= set(found["rows"])
        papers.add(found["paper"])
    assert len(papers) == 2, "light and dark look the same"


def test_an_unreadable_thumbnail_is_marked(made):
    falls = [RankDrop("a", None, "q", 1, 9, 2, None), RankDrop("b", b"JPEG", "q", 1, 9, 2, 0.5)]
    text = report._page(made[0], [], falls, "run").render()
    assert text.count("<span>unreadable</span>") == text.count('<img alt="image b"') == 1 and '"image a"' not in text


def test_svg_is_the_same_every_time(made):
    draw = report_figures.kept_against_cost(made[0], "counted")
    first = report_figures.render(draw, report_figures.DARK, "svg")
    assert first == report_figures.render(draw, report_figures.DARK, "svg") and first.startswith(b"<?xml")
    assert Image.open(io.BytesIO(report_figures.render(draw, report_figures.LIGHT, "png"))).size[0] == 810
