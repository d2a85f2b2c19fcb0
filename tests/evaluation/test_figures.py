"""Table and verdict sentences match the numbers; figures are PNG files of the stated size."""

import copy
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.records.retrieval import Difference, Flops, GalleryCounts, QueryCounts, RetrievalEvaluation, Run
from icar_jax.evaluation.report import figures, table
from icar_jax.evaluation.routing.timing import Timing

PIXELS = tuple(round(inches * figures.DPI) for inches in figures.SIZE_INCHES)


def made_up_run(r5, flops, speed, share, kept):
    return Run(
        text_to_image={"r1": r5 / 3, "r5": r5, "r10": r5 * 1.3},
        image_to_text={"r1": r5 / 3, "r5": r5 + 1, "r10": r5 * 1.4},
        flops_per_image=flops,
        images_per_s=speed,
        share=share,
        retention=Interval(*kept),
    )


@pytest.fixture
def record():
    return RetrievalEvaluation(
        runs={
            "random": made_up_run(39.9, 0.424e9, None, {12: 0.48, 6: 0.52}, (94.6, 92.5, 96.7)),
            "routed": made_up_run(41.0, 0.441e9, 290.0, {12: 0.48, 6: 0.52}, (97.1, 94.0, 100.3)),
            "exit_12": made_up_run(42.1, 0.62e9, 310.0, {12: 1.0}, (100.0, 100.0, 100.0)),
            "exit_6": made_up_run(30.0, 0.32e9, 580.0, {6: 1.0}, (71.0, 67.0, 75.2)),
            "full": made_up_run(42.1, 0.62e9, 310.0, {12: 1.0}, (100.0, 100.0, 100.0)),
        },
        gallery=GalleryCounts(500, 2500, QueryCounts(500, 2500), "made up"),
        comparisons={"routed_minus_random": Difference(1.2, -0.3, 2.6, True)},
        timing=Timing(500, 3, 3.0, 0.5, {6: 1.0, 12: 2.0}, 0.4, 0.9, None),
        flops=Flops({}, None, 1e7),
        notes=["The colour baseline reaches [3%]."],
    )


def printed(record, width):
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    table.print_results(record, console)
    return console.export_text()


def test_wide_table_has_one_line_per_run(record):
    text = printed(record, 124)
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    assert [name for name in rows if name in record.runs] == ["full", "exit_6", "exit_12", "routed", "random"]
    routed = next(line for line in text.splitlines() if "│ routed" in line)
    for cell in ("13.7/41.0/53.3", "0.441", " 71 ", " 290 ", "6: 52%  12: 48%", "97.1 [94.0, 100.3]"):
        assert cell in routed
    assert "- The colour baseline reaches [3%]." in text, "brackets are text, not markup"
    assert "gallery of 500 images and 2,500 captions" in text


def test_compact_table_fits_80_columns(record):
    record.runs["routed"].retention = None
    lines = printed(record, 80).splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("- "))
    text = "\n".join(lines)
    for cell in ("13.7/41.0/53.3", "6: 52%", "12: 48%", "[67.0, 75.2]", "undefined"):
        assert cell in text, f"{cell!r} was cut off"


def test_verdict_on_random_routing(record):
    assert (
        "routed - random = +1.2 points R@5, 95% interval [-0.3, 2.6]: includes zero, so routing is not shown to beat "
        "random routing at these shares"
    ) in table.verdicts(record)
    record.comparisons["routed_minus_random"] = Difference(1.2, 0.4, 2.6, False)
    assert any(line.endswith("above zero, so routing beats random routing at these shares") for line in table.verdicts(record))
    record.comparisons["routed_minus_random"] = Difference(-1.0, -2.0, -0.2, False)
    assert any(line.endswith("so routing is worse than random routing at these shares") for line in table.verdicts(record))


def verdict(record, word):
    return next((line for line in table.verdicts(record) if word in line), None)


def test_verdicts_on_retention_time_and_chance(record):
    assert "R@5 42.1% (42.1 times chance, 1%)" in verdict(record, "chance")
    assert "97.1%" in verdict(record, "routed retains") and "includes 100" in verdict(record, "routed retains")
    assert verdict(record, "time:").startswith("routing loses time: 290.0 images/s")
    assert verdict(record, "saves no FLOPs") is None
    assert "and no slower" in verdict(record, "exit_12 for every image is at least as good")
    record.runs["exit_12"].images_per_s = 280.0
    assert verdict(record, "for every image is at least as good") is None
    routed = record.runs["routed"]
    routed.images_per_s, routed.flops_per_image, routed.share = 620.0, 0.7e9, {6: 0.001, 12: 0.999}
    routed.retention = Interval(97.1, 94.0, 98.0)
    assert verdict(record, "time:").startswith("routing saves time") and "2.00 times" in verdict(record, "time:")
    assert verdict(record, "saves no FLOPs")
    assert verdict(record, "single exit plus the router's cost")
    assert verdict(record, "for every image is at least as good").startswith("exit_12")
    assert "routing loses retrieval quality" in verdict(record, "routed retains")
    record.runs["full"].text_to_image["r5"] = 1.5
    assert "less than twice chance" in verdict(record, "chance")
    routed.retention = None
    assert verdict(record, "undefined")


def test_verdicts_without_routing(record):
    record.runs = {"full": record.runs["full"]}
    assert len(table.verdicts(record)) == 1


def test_full_depth_is_required(record, tmp_path):
    del record.runs["full"]
    for function in (table.results_table, lambda r: figures.retention_against_cost(r, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="must hold 'full'"):
            function(record)
    with pytest.raises(ValueError, match="exit_<blocks>"):
        table.run_order({"exit_early": record.runs["exit_6"]})


def check_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == PIXELS
        assert len(image.convert("RGB").getcolors(1 << 24)) > 5, "the figure is empty"


def test_retention_figure(record, tmp_path):
    path = tmp_path / "new" / "retention.png"
    before = copy.deepcopy(record)
    figures.retention_against_cost(record, path)
    check_png(path)
    assert record == before
    first = path.read_bytes()
    figures.retention_against_cost(record, path)
    assert path.read_bytes() == first, "equal numbers give equal bytes"


def test_retention_figure_with_undefined_runs(record, tmp_path):
    record.runs["exit_6"].retention = None
    figures.retention_against_cost(record, tmp_path / "some.png")
    for run in record.runs.values():
        run.retention = None
    figures.retention_against_cost(record, tmp_path / "none.png")
    check_png(tmp_path / "some.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


@pytest.mark.parametrize("thresholds", [[], [0.4], [0.3, 0.31, 0.9], [-1.0], [2.0]])
def test_complexity_histogram(thresholds, tmp_path):
    scores = np.random.default_rng(0).beta(2, 3, 200).astype(np.float32)
    figures.complexity_histogram(scores, thresholds, tmp_path / "scores.png", exits=range(len(thresholds) + 1))
    check_png(tmp_path / "scores.png")


def test_histogram_of_equal_scores_counts_strictly(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "_stagger", lambda figure, texts: shown.extend(t.get_text() for t in texts))
    figures.complexity_histogram(np.full(10, 0.5), [0.5], tmp_path / "scores.png", exits=[6, 12])
    assert shown == ["6 blocks: 100%", "12 blocks: 0%"], "a score equal to the threshold stays early"


@pytest.mark.parametrize(
    ("thresholds", "shown", "unused"),
    [
        ((0.4, 2.0), ["2 blocks: 40%", "4 blocks: 60%"], "not used: 6 blocks"),
        ((-1.0, 0.4), ["4 blocks: 40%", "6 blocks: 60%"], "not used: 2 blocks"),
        ((-1.0, 2.0), [], "not used: 2 blocks, 6 blocks"),
        ((2.0, 2.0), [], "not used: 4 blocks, 6 blocks"),
        ((0.4, 1.0), ["2 blocks: 40%", "4 blocks: 60%", "6 blocks: 0%"], ""),
    ],
)
def test_the_histogram_spans_the_scores_where_an_exit_is_not_used(thresholds, shown, unused, tmp_path, monkeypatch):
    found = {}

    def look(figure, texts):
        (axes,) = figure.axes
        found.update(shown=[t.get_text() for t in texts], high=axes.get_xlim()[1], axes=axes)

    monkeypatch.setattr(figures, "_stagger", look)
    figures.complexity_histogram(np.linspace(0.1, 0.85, 20), thresholds, tmp_path / "x.png", exits=(2, 4, 6))
    assert found["shown"] == shown and found["high"] < 1.1
    assert ("not used" in found["axes"].get_xlabel()) == bool(unused) and unused in found["axes"].get_xlabel()


@pytest.mark.parametrize(
    ("scores", "thresholds", "exits", "message"),
    [
        ([], [0.5], None, "at least one image"),
        ([0.1, np.nan, np.inf], [0.5], None, "2 of 3 complexity scores"),
        ([0.1], [0.5, 0.4], None, "ascending"),
        ([0.1], [np.nan], None, "finite"),
        ([0.1], [0.5], [6], "make 2 exits, found 1"),
    ],
)
def test_histogram_errors_are_specific(scores, thresholds, exits, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        figures.complexity_histogram(scores, thresholds, tmp_path / "x.png", exits=exits)
    assert not list(tmp_path.iterdir())
