"""One text where a list of texts belongs is a TypeError everywhere, not a list of letters."""

import numpy as np
import pytest

import icar_jax
from icar_jax.data.records import Record
from icar_jax.data.sources.files import ImageFiles, ImagePaths
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.evaluation.metrics import category
from icar_jax.evaluation.metrics.colour_baseline import colour_histogram_baseline
from icar_jax.evaluation.metrics.retrieval import Distractors

ROWS = np.eye(2, dtype=np.float32)
PICTURES = [np.zeros((4, 4, 3), np.uint8)] * 2
CALLS = {
    "labels": lambda: category.precisions(ROWS, ROWS, np.arange(2), labels=["cat", "car"]),
    "labels of all": lambda: category.precisions(ROWS, ROWS, np.arange(2), labels="ab"),
    "labels of distractors": lambda: category.precisions(
        ROWS, ROWS, np.arange(2), labels=[["cat"], ["car"]], distractors=Distractors(ROWS, ROWS, np.arange(2), ["cat", "dog"])
    ),
    "label sets": lambda: category.LabelSets(["cat"]),
    "captions of training images": lambda: colour_histogram_baseline(PICTURES, ["a", "b"], PICTURES, [["a"], ["b"]]),
    "captions of test images": lambda: colour_histogram_baseline(PICTURES, [["a"], ["b"]], PICTURES, ["a", "b"]),
    "captions of a record": lambda: Record("a.jpg", lambda: None, "a cat"),
    "labels of a record": lambda: Record("a.jpg", lambda: None, ("a cat",), labels="cat"),
    "captions of a tokenizer": lambda: Tokenizer.train("a cat on a mat", 300),
    "files": lambda: ImageFiles("photographs"),
    "paths": lambda: ImagePaths("photographs"),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_text_is_no_list(call):
    with pytest.raises(TypeError, match=r"must be a list or tuple of texts, found the text '.*; write \['"):
        CALLS[call]()


def test_one_query_is_no_list(clip_folder):
    with pytest.raises(TypeError, match=r"texts of encode_text must be a list .*found the text 'a cat'; write \['a cat'\]"):
        icar_jax.load(clip_folder).encode_text("a cat")


def test_lists_and_tuples_pass():
    found = category.precisions(ROWS, ROWS, np.arange(2), labels=[["cat"], ("car", "cat")], at=(1,))
    assert found.values["text_to_image"]["official"][1].tolist() == [1.0, 1.0]
