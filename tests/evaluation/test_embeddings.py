"""Saved embeddings: files of every kind and of wrong ones, pairs by name and row, distractors, labels and folds."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icar_jax import cli
from icar_jax.errors import ConfigError, DataError
from icar_jax.evaluation.embeddings.evaluate import evaluate_embeddings
from icar_jax.evaluation.embeddings.files import read_embeddings, read_pairs, write_embeddings
from icar_jax.evaluation.metrics import category, comparison
from icar_jax.evaluation.metrics.folds import fold_metrics, fold_of
from icar_jax.evaluation.metrics.retrieval import Distractors, ranks, summarise

N, C, D = 40, 3, 8
OWNER = np.random.default_rng(5).permutation(np.repeat(np.arange(N), C))
NAMES = [f"{n:03}.jpg" for n in range(N)]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(N, D)))
    return images, unit(images[OWNER] + 0.4 * rng.normal(size=(N * C, D)))


@pytest.fixture
def saved(tmp_path, vectors):
    write_embeddings(tmp_path / "images.npz", vectors[0], names=np.array(NAMES))
    write_embeddings(tmp_path / "texts.npz", vectors[1], image=OWNER)
    return tmp_path


def test_the_metrics_are_those_of_ranks(saved, vectors, capsys):
    record = evaluate_embeddings(saved / "images.npz", saved / "texts.npz", saved / "out", bootstrap=50)
    found = ranks(*vectors, OWNER)
    expected = summarise(found)
    assert {d: record.metrics(d) for d in expected} == expected
    compared = comparison.intervals({"full": comparison.collect(found)}, n=50)["full"]
    assert record.intervals["mean"]["r5"] == compared["mean"]["r5"].value and not record.notes
    written = json.loads((saved / "out" / "metrics.json").read_text())
    assert written["text_to_image"] == expected["text_to_image"] and written["gallery"]["captions"] == N * C
    assert (saved / "out" / "recall.png").read_bytes()[:4] == b"\x89PNG"
    assert "R@5, %" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["npy", "npz", "float16", "float64", "lists", "fixed"])
def test_files_of_other_libraries(tmp_path, vectors, kind, scale):
    rows = scale * vectors[0]
    if kind == "npy":
        path = tmp_path / "a.npy"
        np.save(path, rows)
    elif kind in ("lists", "fixed"):
        path = tmp_path / "a.parquet"
        column = (
            pa.array(rows.tolist(), pa.list_(pa.float32()))
            if kind == "lists"
            else pa.FixedSizeListArray.from_arrays(rows.ravel(), D)
        )
        pq.write_table(pa.table({"file": NAMES, "vector": column}), path, row_group_size=7)
    else:
        path = tmp_path / "a.npz"
        np.savez(path, rows.astype(kind if kind.startswith("float") else np.float32), ids=np.array(NAMES))
    found = read_embeddings(path)
    np.testing.assert_allclose(found.rows, vectors[0], atol=1e-3 if kind == "float16" else 1e-6)
    assert found.rows.dtype == np.float32 and found.normalised == (scale != 1.0)
    assert found.names == (None if kind == "npy" else NAMES)
    np.testing.assert_allclose(read_embeddings(path, normalise=False).rows, rows, atol=3e-3 if kind == "float16" else 1e-6)


def test_pairs_in_every_form(saved, vectors):
    images = read_embeddings(saved / "images.npz")
    write_embeddings(saved / "captions.npz", vectors[1], names=np.array([f"caption {i}" for i in range(N * C)]))
    texts = read_embeddings(saved / "captions.npz")
    order = np.random.default_rng(1).permutation(N * C).tolist()
    files = {
        "by_name.csv": "text,image\n" + "".join(f"caption {i},{NAMES[OWNER[i]]}\n" for i in order),
        "in_order.tsv": "caption\timage\n" + "".join(f"a, b\t{NAMES[i]}\n" for i in OWNER),
        "rows.json": json.dumps(OWNER.tolist()),
        "names.json": json.dumps([NAMES[i] for i in OWNER]),
    }
    for name, text in files.items():
        (saved / name).write_text(text)
    np.save(saved / "rows.npy", OWNER)
    np.savez(saved / "rows.npz", OWNER)
    columns = {"text": [f"caption {i}" for i in order], "image": [NAMES[OWNER[i]] for i in order]}
    pq.write_table(pa.table(columns), saved / "pairs.parquet")
    for name in (*files, "rows.npy", "rows.npz", "pairs.parquet"):
        np.testing.assert_array_equal(read_pairs(saved / name, images, texts), OWNER, err_msg=name)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.csv", "image\n000.jpg\nno.jpg\n", "image, entry 1: 'no.jpg' is no row of .*one of its names, such as '000.jpg'"),
        ("p.csv", "image\n000.jpg\n", "1 pairs name 1 texts, and .* has 120"),
        ("p.csv", "picture\n000.jpg\n", "line 1: expected the column image"),
        (
            "p.csv",
            "text,image\nx,000.jpg\n",
            "text, entry 0: 'x' is no row of .*row number from 0 to 119, since it holds no names",
        ),
        ("p.json", "[40]", "image, entry 0: 40 is no row"),
        ("p.json", "{}", "expected a list"),
        ("p.txt.gz", "", "expected pairs in a"),
    ],
)
def test_wrong_pairs(saved, name, text, message):
    (saved / name).write_text(text)
    images, texts = (read_embeddings(saved / f"{kind}.npz") for kind in ("images", "texts"))
    with pytest.raises(DataError, match=message):
        read_pairs(saved / name, images, texts)


def test_numbers_that_could_be_names_or_rows_are_refused(tmp_path, vectors):
    write_embeddings(tmp_path / "i.npz", vectors[0], names=np.array([str(n) for n in reversed(range(N))]))
    write_embeddings(tmp_path / "t.npz", vectors[1], image=OWNER)
    with pytest.raises(DataError, match="could be names of .* and could be its rows"):
        evaluate_embeddings(tmp_path / "i.npz", tmp_path / "t.npz", tmp_path / "out")


def test_wrong_files(saved, tmp_path, vectors):
    cases = {
        "a.txt": ("x", "expected embeddings in an .npz"),
        "a.npz": ("x", "expected an .npz of plain arrays"),
        "a.parquet": ("PAR1", "not a complete Parquet file"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_embeddings(tmp_path / name)
    rows = vectors[0].copy()
    rows[7] = 0
    np.savez(tmp_path / "zero.npz", rows)
    with pytest.raises(DataError, match=r"1 of 40 vectors are zero or not finite \(first: row 7\)"):
        read_embeddings(tmp_path / "zero.npz")
    np.savez(tmp_path / "two.npz", a=rows, b=rows)
    with pytest.raises(DataError, match=r"expected one array .*or `embeddings`; found a float32 \[40, 8\], b"):
        read_embeddings(tmp_path / "two.npz")
    np.savez(tmp_path / "short.npz", vectors[0], names=np.array(NAMES[:3]))
    with pytest.raises(DataError, match=r"names has shape \[3\]; expected \[40\]"):
        read_embeddings(tmp_path / "short.npz")
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match="expected 2 numbers in each of the column embedding"):
        read_embeddings(tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"expected one column of lists .*it has a \(string\)"):
        read_embeddings(tmp_path / "none.parquet")


def test_wrong_combinations(saved, tmp_path, vectors):
    images, texts, out = saved / "images.npz", saved / "texts.npz", tmp_path / "out"
    np.savez(tmp_path / "wide.npz", np.eye(9, dtype=np.float32))
    with pytest.raises(DataError, match="of 8 dimensions and .* of 9"):
        evaluate_embeddings(images, tmp_path / "wide.npz", out)
    np.savez(tmp_path / "bare.npz", vectors[1])
    with pytest.raises(DataError, match="40 rows and .* 120, and nothing says which belong together"):
        evaluate_embeddings(images, tmp_path / "bare.npz", out)
    np.savez(tmp_path / "few.npz", vectors[1][:3], image=np.array([0, 0, 5]))
    with pytest.raises(DataError, match=r"38 of 40 images have no text \(first: row 1\)"):
        evaluate_embeddings(images, tmp_path / "few.npz", out)
    with pytest.raises(ConfigError, match="folds are galleries"):
        evaluate_embeddings(images, texts, out, folds=2, distractors=(images, texts))
    with pytest.raises(DataError, match=r"40 distractors are also in .*\(such as 000\.jpg\)"):
        evaluate_embeddings(images, texts, out, distractors=(images, texts))
    assert not out.exists()


def test_rows_in_the_same_order_are_pairs_and_the_note_says_so(tmp_path, vectors):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", vectors[0])
    record = evaluate_embeddings(tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "out", bootstrap=10)
    assert record.text_to_image["r1"] == 100.0 and "no --pairs: row i of" in record.notes[0]


def test_distractors_and_labels(saved, vectors, tmp_path, capsys):
    far = unit(np.random.default_rng(3).normal(size=(30, D)))
    write_embeddings(tmp_path / "far.npz", far, names=np.array([f"far {i}" for i in range(30)]))
    write_embeddings(tmp_path / "far_texts.npz", far[::-1].copy(), image=np.arange(30)[::-1])
    labels = {name: ["cat"] if i % 2 else ["dog", "cat"] for i, name in enumerate(NAMES)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "far.json").write_text(json.dumps({"far 3": ["dog"]}))
    cli.main(
        ["evaluate-embeddings", str(saved / "images.npz"), str(saved / "texts.npz"), "--distractors", str(tmp_path / "far.npz"),
         str(tmp_path / "far_texts.npz"), "--labels", str(tmp_path / "labels.json"), "--distractor-labels",
         str(tmp_path / "far.json"), "--bootstrap", "20"]
    )  # fmt: skip
    record = json.loads((saved / "images_evaluation" / "metrics.json").read_text())
    others = Distractors(far, far[::-1], np.arange(30)[::-1], [("dog",) if i == 3 else () for i in range(30)])
    found = summarise(ranks(*vectors, OWNER, distractors=others))
    precise = category.precisions(*vectors, OWNER, list(labels.values()), distractors=others)
    for direction, expected in category.summarise(precise).items():
        assert record[direction] == found[direction] | expected
    assert record["gallery"]["images"] == N + 30 and record["gallery"]["queries"]["images"] == N
    assert "mAP@10 standard, %" in capsys.readouterr().out


def test_folds_are_galleries_of_their_own(saved, vectors):
    images, texts = vectors
    record = evaluate_embeddings(saved / "images.npz", saved / "texts.npz", saved / "out", folds=4, bootstrap=50)
    expected = []
    for fold in range(4):
        part = np.arange(10 * fold, 10 * fold + 10)
        own = np.flatnonzero(np.isin(OWNER, part))
        expected.append(summarise(ranks(images[part], texts[own], OWNER[own] - 10 * fold)))
    assert list(record.folds.each) == expected and record.folds.images == (10, 10, 10, 10)
    for direction in ("text_to_image", "image_to_text"):
        found = getattr(record.folds, direction)
        for metric, interval in found.items():
            assert interval.value == pytest.approx(np.mean([each[direction][metric] for each in expected]))
            assert interval.low <= interval.high
    assert record.folds.text_to_image["r1"].value > record.text_to_image["r1"], "smaller galleries are easier"
    assert "mean R@1, 5, 10 of 4 folds of 10 images" in record.notes[-1]


def test_one_fold_is_the_whole_set(vectors):
    found = fold_metrics(*vectors, OWNER, np.zeros(N, np.int64), n=40)
    whole = comparison.intervals({"full": comparison.collect(ranks(*vectors, OWNER))}, n=40)["full"]
    assert found.mean == {metric: each.value for metric, each in whole["mean"].items()}
    np.testing.assert_array_equal(fold_of(np.arange(5000), 5, 5000), np.repeat(np.arange(5), 1000))
    with pytest.raises(ConfigError, match="6 folds of 5 images"):
        fold_of(np.arange(5), 6, 5)
