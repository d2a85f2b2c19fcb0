"""`make quick`: which tests a change touches."""

from pathlib import Path

import pytest

from tests.support.touched import ROOT, touched

FILES = [
    p.relative_to(ROOT)
    for top in ("icar_jax", "tests", "benchmarks", "experiments")
    for p in sorted((ROOT / top).rglob("*.py"))
]


def names(*changed):
    return {file.name for file in touched({Path(name) for name in changed}, FILES)}


@pytest.mark.parametrize(
    "changed, expected, most",
    [
        ("icar_jax/evaluation/routing/frontier.py", "test_frontier.py", 8),
        ("icar_jax/search/scan.py", "test_index.py", 12),  # no test imports it: those of what imports it
        ("icar_jax/data/sources/tar.py", "test_webdataset.py", 12),
        ("configs/photos.py", "test_config.py", 8),
        ("tests/data/test_order.py", "test_order.py", 2),
        ("icar_jax/evaluation/" + "gone" + ".py", "tests", 1),  # what nothing names, this file included, may be anything
        ("icar_jax/search/server/static/" + "unheard" + ".of", "tests", 1),
    ],
)
def test_a_change_is_tested_by_what_reaches_it_and_little_else(changed, expected, most):
    found = names(changed)
    assert expected in found and len(found) <= most, found
