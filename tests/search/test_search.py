"""icar search: hits, scores, the verdict, filters and errors."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.inference.forward import count_compilations
from icar_jax.search import background as bg
from icar_jax.search import query as search
from icar_jax.search.access import StoreError
from icar_jax.search.opening import create_store, open_store
from icar_jax.search.plain import PLAIN
from tests.support.stores import CAPTIONS, filled, rows, unit

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def model(clip_folder):
    return icar_jax.load(clip_folder, batch_size=8)


@pytest.fixture(scope="module")
def store_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    filled(folder, model)
    return folder


@pytest.fixture
def searcher(store_folder, model):
    return search.Searcher(open_store(store_folder), model)


def stored(store):
    table = store.images.search().to_arrow()
    return table, np.array(table["vector"].to_pylist(), np.float32)


def test_hits_are_those_of_a_plain_sort_by_cosine(searcher, model):
    table, embeddings = stored(searcher.store)
    text = model.encode_text(["a red bird on a tree"])[0]
    cosines = embeddings @ text / np.linalg.norm(embeddings, axis=1)
    best = np.argsort(-cosines)[:15]
    found = searcher.search_text("a red bird on a tree", k=15)
    assert [hit.path for hit in found.hits] == [table["path"][int(i)].as_py() for i in best]
    assert np.allclose([hit.cosine for hit in found.hits], cosines[best], atol=1e-5)
    first = found.hits[0]
    assert (first.path, first.caption) == ("/pictures/001.png", CAPTIONS[1])
    assert (first.exit, first.sha256) == (model.exits[1], f"{1:064x}")
    assert first.cosine > 0.999 and set(found.latency_s) == {"encode", "search"}


def test_more_than_there_are_and_fewer_than_the_verdict_needs(searcher):
    assert len(searcher.search_text("a dog runs", k=1000).hits) == 60
    few, many = searcher.search_text("a dog runs", k=1), searcher.search_text("a dog runs", k=30)
    # Matrix products of other sizes round differently.
    one, first = (dataclasses.asdict(found.hits[0]) for found in (few, many))
    assert one["path"] == first["path"] and one["cosine"] == pytest.approx(first["cosine"], abs=1e-6)
    assert one["score"] == pytest.approx(first["score"], rel=1e-5)
    assert few.nothing_here.verdict == many.nothing_here.verdict
    assert few.nothing_here.statistic == pytest.approx(many.nothing_here.statistic, rel=1e-5)
    with pytest.raises(search.QueryError, match="k must be at least 1"):
        searcher.search_text("a dog runs", k=0)


def test_a_filter_holds_for_every_hit(searcher, model):
    found = searcher.search_text("a dog runs", k=60, where=f"complexity < 0.4 AND exit = {model.exits[0]}")
    assert found.hits and all(hit.complexity < 0.4 and hit.exit == model.exits[0] for hit in found.hits)
    none = searcher.search_text("a dog runs", where="complexity > 2")
    assert none.hits == [] and none.nothing_here.verdict and none.nothing_here.statistic is None


@pytest.mark.parametrize("where", ["? = 1", "NOT " * 300 + "exit", "exit / 0 = 1", "complexty < 0.4",
                                   "complexity <", "complexity = 'a", "; DROP TABLE images",
                                   "1=1; DROP TABLE images", "1=1;", "path = 'a' ; 'b'"])  # fmt: skip
def test_a_bad_filter_names_the_columns_in_one_line(searcher, where):
    with pytest.raises(search.QueryError) as error:
        searcher.search_text("a dog runs", where=where)
    message = str(error.value)
    assert "\n" not in message and "complexity" in message and "exit" in message and ".rs:" not in message
    assert len(searcher.search_text("a dog runs", k=3).hits) == 3


def test_a_semicolon_in_a_text_is_a_text(searcher):
    assert searcher.search_text("a dog runs", where="path = 'it''s; that' OR path = '/pictures/003.png'").hits
    assert searcher.search_text("a dog runs", where="path != ';' AND exit > 0", k=3).hits


def test_names_and_captions_cannot_steer_the_terminal(model, tmp_path, capsys):
    store = filled(tmp_path / "store", model, n=3, captions=["evil \x1b[2J\u202ecaption\nsecond line"], prefix="/a\n\x1b]0;x")
    out = run(capsys, "a dog", "--store", store.uri)
    assert "\x1b" not in out and "\u202e" not in out and "/a\\n\\x1b]0;x/001.png  (evil \\x1b[2J\\u202ecaption)" in out
    assert all(line.split()[0].isdigit() for line in out.splitlines() if "png" in line)
    store.set_bad([{"path": "/pic\x1b[31m.png", "size": 1, "mtime_ns": 1, "reason": "no\nimage"}])
    cli.main(["index", "--bad", "--store", store.uri])
    assert capsys.readouterr().out == "/pic\\x1b[31m.png: no\\nimage\n"
    cli.main(["index", "/elsewhere", "--bad", "--store", store.uri])
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("0 files")
    cli.main(["index", "/", "--bad", "--json", "--store", store.uri])
    assert json.loads(capsys.readouterr().out)[0]["path"] == "/pic\x1b[31m.png"


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_query_is_refused(searcher, text):
    with pytest.raises(search.QueryError, match="empty"):
        searcher.search_text(text)


def test_a_long_query_is_cut_and_says_so(searcher):
    long = "a red bird on a tree " * 30
    assert searcher.search_text(long).truncated
    assert not searcher.search_text("a").truncated
    assert searcher.search_text(long + "and more").hits == searcher.search_text(long).hits


def test_a_text_query_runs_the_text_tower_alone(store_folder, clip_folder):
    fresh = search.open_searcher(store_folder, clip_folder, batch_size=8)
    fresh.warm_up(images=False)
    with count_compilations() as compiled:
        fresh.search_text("two cats asleep")
        fresh.search_text("a query of other words and another length")
    assert compiled() == 0


def test_scores_are_the_softmax_over_the_background(searcher, model):
    """Against the formula in the module docstring, one text at a time."""
    found = searcher.search_text("two cats asleep", k=8)
    background = searcher._text_background()
    table, embeddings = stored(searcher.store)
    where = {path: i for i, path in enumerate(table["path"].to_pylist())}
    for hit in found.hits:
        texts = [v for v, path in zip(background.vectors, background.paths, strict=True) if path != hit.path]
        image = embeddings[where[hit.path]].astype(np.float64)
        others = np.mean([np.exp(model.temperature * (v @ image)) for v in texts])
        ratio = np.exp(model.temperature * hit.cosine) / others
        assert hit.score == pytest.approx(ratio / (ratio + bg.REFERENCE), rel=1e-3)
    assert all(0 < hit.score < 1 for hit in found.hits)


def test_the_background_holds_captions_and_plain_texts_once_and_is_kept(store_folder, model):
    store = open_store(store_folder)
    first = search.Searcher(store, model)._text_background()
    own = [path for path in first.paths if path]
    assert len(first.paths) == len(own) + len(PLAIN) and 1 <= len(own) <= 3  # three distinct captions
    assert np.allclose(np.linalg.norm(first.vectors, axis=1), 1, atol=2e-3)
    model_asked = []

    class Counting:
        identity, temperature = model.identity, model.temperature

        def __getattr__(self, name):
            model_asked.append(name)
            return getattr(model, name)

    again = bg.open_background(store, Counting(), None)
    assert not model_asked and again.threshold == first.threshold
    assert np.array_equal(again.vectors, first.vectors) and list(again.paths) == list(first.paths)


def test_the_background_is_made_anew_for_a_store_that_has_grown(model, tmp_path):
    store = filled(tmp_path / "store", model, n=40)
    searcher = search.Searcher(store, model)
    before = searcher.search_text("a dog runs").nothing_here.threshold
    captions = [f"caption {i}" for i in range(100)]
    store.upsert(rows(unit(np.random.default_rng(1), 100, model.embed_dim), model.exits, captions, "/more"))
    after = searcher.search_text("a dog runs").nothing_here.threshold
    assert before != after
    assert sum(path.startswith("/more") for path in searcher._text_background().paths) > bg.MIN_OWN_CAPTIONS


def test_thresholds_by_captions_and_without():
    own, plain = np.linspace(2, 6, 100), np.linspace(0, 4, 100)
    assert bg.threshold_of(own, plain) == pytest.approx(2.2)
    assert bg.threshold_of(own[: bg.MIN_OWN_CAPTIONS - 1], plain) == pytest.approx(2)


def test_a_lift_is_blind_to_what_an_image_does_to_all_texts():
    """Moving an image along a direction shared by all texts changes its cosines, but not its lift."""
    rng = np.random.default_rng(0)
    texts = np.concatenate([unit(rng, 20, 8), np.full((20, 1), 0.5)], axis=1)
    image = np.append(unit(rng, 1, 8)[0], 0.0)
    moved = image + np.eye(9)[8] * 0.7
    background = bg.Background(texts[1:].astype(np.float32), np.array([""] * 19, object), 20.0)
    lifts = [background.lifts(np.array([texts[0] @ x]), x[None], ["/x"])[0] for x in (image, moved)]
    assert lifts[0] == pytest.approx(lifts[1], abs=1e-4)


def test_the_verdict_tells_what_is_here_from_what_is_not(model, tmp_path):
    """Captions equal to image embeddings match; directions away from all images do not."""
    rng = np.random.default_rng(3)
    endings = ("runs", "asleep", "on a tree", "a", "the")
    texts = [f"{a} {b}" for a in ("dog", "cat", "bird", "tree", "red", "two") for b in endings]
    embeddings = model.encode_text(texts)
    store = create_store(tmp_path / "store", model.identity, model.embed_dim, model.exits, str(model.path))
    noisy = embeddings + 0.02 * rng.standard_normal(embeddings.shape)
    store.upsert(rows(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), model.exits, texts))
    searcher = search.Searcher(store, model)
    here = [searcher.search_text(text).nothing_here.statistic for text in texts]
    elsewhere = [searcher.search_text(text).nothing_here.statistic for text in ("zzz qqq", "0 1 2 3", "!!! ???")]
    assert np.median(here) > np.median(elsewhere)


def test_an_image_finds_itself(model, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]
    store = create_store(tmp_path / "store", model.identity, model.embed_dim, model.exits, str(model.path))
    store.upsert(rows(model.encode_image(pictures, exit=model.exits[-1]), model.exits[-1:]))
    found = search.Searcher(store, model).search_image(pictures[7], k=3)
    assert found.hits[0].path == "/pictures/007.png" and found.hits[0].cosine > 0.999 and len(found.hits) == 3
    assert found.hits[0].score == max(hit.score for hit in found.hits)
    assert not found.nothing_here.verdict and found.nothing_here.statistic is None


def test_an_empty_store_has_no_hits_and_the_command_says_so(model, tmp_path, capsys):
    store = create_store(tmp_path / "store", model.identity, model.embed_dim, model.exits, str(model.path))
    found = search.Searcher(store, model).search_text("a dog runs")
    assert found.hits == [] and found.nothing_here.verdict
    with pytest.raises(SystemExit, match="2"):
        cli.main(["search", "a dog", "--store", str(tmp_path / "store")])
    assert "is empty" in capsys.readouterr().err


def test_a_store_of_another_model_is_refused(store_folder, complexity_folder, model):
    other = open_store(store_folder)
    other.meta["model"] = {"clip": "0" * 64}
    with pytest.raises(StoreError, match="0000"):
        search.Searcher(other, model)
    with pytest.raises(StoreError, match="no CLIP"):
        search.open_searcher(store_folder, complexity_folder)


def test_a_checkpoint_that_moved_is_asked_for(store_folder, clip_folder, model, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(clip_folder, moved)
    store = filled(tmp_path / "store", model)
    store.set_meta(checkpoint=str(tmp_path / "gone"))
    with pytest.raises(StoreError, match="--checkpoint"):
        search.open_searcher(tmp_path / "store")
    assert search.open_searcher(tmp_path / "store", moved).search_text("a dog runs", k=1).hits


def run(capsys, *words):
    cli.main(["search", *map(str, words)])
    return capsys.readouterr().out


def test_the_command_prints_a_table_and_writes_nothing_unless_asked_to_note_the_hits(store_folder, capsys):
    run(capsys, "a dog", "--store", store_folder)  # computes the background on first use
    before = open_store(store_folder).returned().get("/pictures/001.png", 0)
    files = sorted(store_folder.rglob("*"))
    lines = run(capsys, "a red bird on a tree", "--store", store_folder, "-k", 4).splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["rank"])
    assert lines[header].split() == ["rank", "cosine", "score", "exit", "complexity", "path"]
    assert len(lines) == header + 7 and "/pictures/001.png  (a red bird on a tree)" in lines[header + 1]
    assert sorted(store_folder.rglob("*")) == files
    assert run(capsys, "a red bird on a tree", "--store", store_folder, "-k", 4, "--note-hits")
    assert open_store(store_folder).returned()["/pictures/001.png"] == before + 1


def test_the_command_prints_json(store_folder, capsys):
    record = json.loads(run(capsys, "a dog runs", "--store", store_folder, "-k", 2, "--json", "--where", "exit = 1", "--exact"))
    assert record["query"] == {"text": "a dog runs", "image": None, "k": 2, "where": "exit = 1", "exact": True}
    assert [set(hit) for hit in record["hits"]] == [{"path", "caption", "cosine", "score", "exit", "complexity", "sha256"}] * 2
    assert set(record["nothing_here"]) == {"verdict", "statistic", "threshold"}


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "text query or --image"), (["a dog", "--image", "x.png"], "text query or --image"), ([" "], "empty"),
        (["--image", "absent.png"], "absent.png"), (["a dog", "--where", "nope = 1"], "the columns are path"),
        (["a dog", "--checkpoint", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_the_command_refuses(store_folder, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", *words, "--store", str(store_folder)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_store_that_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["search", "a dog", "--store", str(tmp_path / "none")])
    assert "there is no store" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    program = "from icar_jax.cli.errors import user_errors\nwith user_errors():\n  while True: print('hit', flush=True)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "hit\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
    process.stderr.close()
