"""Shared code of sharded sources: braces, the calibration split without names, locating records."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.data.records import Source
from icar_jax.data.sources import shards
from icar_jax.data.sources.shard_paths import expand_braces
from icar_jax.data.sources.shards import Rest, Shards, texts
from icar_jax.errors import DataError


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain*.tar", ["plain*.tar"]),
    ],
)
def test_braces(pattern, expected):
    assert expand_braces(pattern) == expected


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_every_record_has_its_place(counts):
    table = Shards(tuple(map(str, counts)), np.array(counts, np.int64), np.array(counts, np.int64))
    places = [(shard, number) for shard, count in enumerate(counts) for number in range(count)]
    assert [table.locate(i) for i in range(len(table))] == places
    for outside in (-1, len(places)):
        with pytest.raises(IndexError):
            table.locate(outside)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(2, 40), data=st.data())
def test_the_rest_is_everything_else_in_order(size, data):
    left_out = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    rest = Rest(range(size), np.array(sorted(left_out), np.int64), "rest")
    assert [rest[i] for i in range(len(rest))] == sorted(set(range(size)) - left_out)
    for outside in (-1, len(rest)):
        with pytest.raises(IndexError):
            rest[outside]


@pytest.mark.parametrize(
    "value, found",
    [
        (None, ()), ("a", ("a",)), (b" b ", ("b",)), ("  ", ()), (["a", None, ["b"], ""], ("a", "b")),
        (np.array([b"x", b"y"], object), ("x", "y")),
    ],
)  # fmt: skip
def test_captions_of_every_form(value, found):
    assert texts(value) == found
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 1: 0xfc\)"):
        texts([value, "gür".encode("latin-1")])
    with pytest.raises(TypeError, match="expected a caption"):
        texts([value, 3])


def test_memory_of_a_large_set():
    """Ten million records are split into training and calibration in kilobytes, without a list of names."""

    class Large(Source):
        name = "large"
        shards = shards.Shards(tuple(map(str, range(1000))), np.full(1000, 10_000), np.full(1000, 10**9))

        def __len__(self):
            return len(self.shards)

        def __getitem__(self, i):
            return i

    tracemalloc.start()
    train, calibration = shards.cut_calibration(Large(), seed=0, size=1000)
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
    assert len(train) == 10_000_000 - 1000 and len(calibration) == 1000
    assert len(pickle.dumps(train.left_out)) + len(pickle.dumps(calibration.indices)) < 20_000


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), size=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_the_calibration_split_covers_everything_once_and_is_stable(counts, size, seed):
    def source(counts):
        numbers = np.array(counts, np.int64)
        labels = tuple(f"{n}.tar" for n in range(len(counts)))
        return type("Numbers", (), {"name": "n", "shards": shards.Shards(labels, numbers, numbers),
                                    "__len__": lambda s: int(sum(counts)), "__getitem__": lambda s, i: i})()  # fmt: skip

    if sum(counts) <= size:
        return
    train, calibration = shards.cut_calibration(source(counts), seed=seed, size=size)
    chosen = [calibration[i] for i in range(len(calibration))]
    kept = [train[i] for i in range(len(train))]
    assert len(chosen) == size and kept == sorted(kept) and sorted(kept + chosen) == list(range(sum(counts)))
    grown = shards.cut_calibration(source([*counts, 25]), seed=seed, size=size)[1].indices
    assert set(grown[grown < sum(counts)]) <= set(chosen)  # an added shard replaces some records and moves no others
