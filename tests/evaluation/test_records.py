"""Records become JSON with exactly the keys that programs know; a field that is not set is left out."""

from dataclasses import dataclass

import pytest

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.comparison import Comparison
from icar_jax.evaluation.metrics.folds import FoldMetrics
from icar_jax.evaluation.metrics.ratings import OF_DECISIONS, OF_RATINGS, OF_SCORES, Confusion, Estimate
from icar_jax.evaluation.records import complexity, retrieval
from icar_jax.evaluation.records.plain import optional, plain
from icar_jax.evaluation.routing.score_calibration import Affine, Bias
from icar_jax.evaluation.routing.timing import Padding, Timing
from tests.support.keys import key_paths, known_keys

RECALLS = dict.fromkeys(("r1", "r5", "r10"), 50.0)
METRICS = RECALLS | dict.fromkeys(("median_rank", "mean_rank"), 2.0)
METRICS |= {f"map{k}{kind}": 50.0 for kind in ("", "_standard") for k in (10, 50, 100)}


def retrieval_record():
    interval = Interval(1.0, 0.0, 2.0)
    compared = dict.fromkeys(METRICS, Comparison(interval, interval, interval))
    full = retrieval.Run(
        text_to_image=METRICS, image_to_text=METRICS, flops_per_image=1e9, share={3: 1.0}, retention=interval,
        intervals=dict.fromkeys(("text_to_image", "image_to_text", "mean"), compared),
    )  # fmt: skip
    return retrieval.RetrievalEvaluation(
        runs={"full": full},
        gallery=retrieval.GalleryCounts(4, 8, retrieval.QueryCounts(2, 4), "made up", "far"),
        comparisons=dict.fromkeys(
            ("routed_minus_random", "routed_affine_minus_routed"), retrieval.Difference(1.0, 0.0, 2.0, True)
        ),
        timing=Timing(2, 3, 1.0, 1.0, {3: 1.0}, 1.0, 1.0, Padding(0, 0.0, 0.0), compile_s=1.0, programs=1),
        flops=retrieval.Flops({3: retrieval.ExitFlops(1e9, 1e9)}, 1e7, 1e7),
    )


def complexity_record(metrics):
    return complexity.ComplexityEvaluation(
        head="regression",
        source="made up",
        images=9,
        runs={"model": dict.fromkeys(metrics, Estimate(0.5, 0.4, 0.6))},
        margin=complexity.Margin("pcc", "jpeg_bytes", 0.1, 0.0, 0.2, True),
        nuisance={"noise": {"low": complexity.NuisanceLevel(0.0, 0.1, 3, {"model": Estimate(0.5)})}},
        cost={"model": complexity.Cost(1e9, 0.01, routing_flops=1e9, ms_per_image=1.0)},
    )


def test_a_retrieval_evaluation_with_every_field_has_the_known_keys():
    record = retrieval_record()
    record.runs["full"].folds = FoldMetrics(
        (1, 1), *[dict.fromkeys([*RECALLS, "median_rank", "mean_rank"], Interval(1.0, 0.0, 2.0))] * 3,
        (dict.fromkeys(("text_to_image", "image_to_text"), RECALLS | dict.fromkeys(("median_rank", "mean_rank"), 2.0)),) * 2,
    )  # fmt: skip
    record.runs["full"].thresholds, record.runs["full"].found = (0.5,), {"method": "budget"}
    record.score_calibration = retrieval.ScoreCalibrationResult(
        {3: Affine()}, 1.0, 1.0, {3: Bias(0.5, 0.1)}, "scenes/calibration", 40
    )
    record.routing = {"thresholds": [0.5]}
    record.frontier = [retrieval.FrontierPoint((0.5,), {3: 1.0}, {"counted": 1.0, "measured": 1.0}, 50.0, 100.0)]
    record.colour_baseline = dict.fromkeys(("text_to_image", "image_to_text"), RECALLS)
    assert key_paths(plain(record)) == known_keys("retrieval")


def test_a_complexity_evaluation_with_every_field_has_the_known_keys():
    record = complexity_record((*OF_RATINGS, *OF_DECISIONS, *OF_SCORES))
    record.regret = complexity.RegretSummary(
        kind="loss", exit=2, rivals=0, clip="CLIP", sha256="0", mean=0.1, deviation=0.1, better_early=0.5,
        pcc={"model": Estimate(None)},
    )  # fmt: skip
    record.over_known = record.margin
    record.threshold, record.boundary, record.confusion = 0.5, 0.5, Confusion(1, 2, 3, 4)
    assert key_paths(plain(record)) == known_keys("complexity")


def test_what_is_not_set_is_left_out():
    found = plain(retrieval_record())
    assert list(found) == ["runs", "gallery", "comparisons", "timing", "flops", "notes"]
    assert list(found["runs"]["full"])[-1] == "intervals" and found["runs"]["full"]["images_per_s"] is None
    assert found["runs"]["full"]["share"] == {"3": 1.0}
    record = complexity_record(OF_RATINGS)
    assert list(plain(record)) == ["task", "head", "source", "images", "runs", "margin", "nuisance", "cost", "notes"]
    assert "routing_flops" not in plain(complexity.Cost())
    record.regret = complexity.RegretSummary(
        kind="loss", exit=2, clip="CLIP", sha256="0", mean=0.1, deviation=0.1, better_early=0.5, pcc={}
    )
    found = plain(record)
    assert found["over_known"] is None, "the known complexity is unknown"
    assert "rivals" not in found["regret"], "an older model"


def test_values_that_json_does_not_hold_are_named_by_their_path():
    @dataclass
    class Inner:
        from_: float
        more: float | None = optional()

    @dataclass
    class Outer:
        parts: dict[int, Inner]

    assert plain(Outer({6: Inner(0.5)})) == {"parts": {"6": {"from": 0.5}}}
    with pytest.raises(ValueError, match="parts/6/more is nan"):
        plain(Outer({6: Inner(0.5, more=float("nan"))}))
