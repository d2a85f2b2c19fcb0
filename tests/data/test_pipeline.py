"""Batches are the same for any number of workers, processes and start positions; bad files are replaced and named."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from icar_jax.data.augment import Augment
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import MAX_SUBSTITUTES, eval_batches, train_batches
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.folders import CaptionFolder
from icar_jax.data.tokenizer import Tokenizer

COUNT, BAD = 23, (4, 11)
PREPROCESS = Preprocess(16, "squash")
AUGMENT = Augment("crop", flip=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = ["file,caption"]
    for i in range(COUNT):
        name = f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(root / name)
        if i in BAD:
            (root / name).write_bytes((root / name).read_bytes()[:200])
        rows += [f"{name},caption {k} of picture {i}" for k in range(3)]
    (root / "captions.csv").write_text("\n".join(rows) + "\n")
    return CaptionFolder(root)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.train([c for i in range(COUNT) for c in folder[i].captions], 300)


def take(count, *args, **options):
    options = {"batch_size": 6, "seed": 3, "augment": AUGMENT} | options
    with train_batches(*args, **options) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            assert type(a[key]) is type(b[key]) is np.ndarray and a[key].dtype == b[key].dtype
            assert a[key].tolist() == b[key].tolist(), key


def test_a_batch(folder, tokenizer):
    for batch in take(8, folder, PREPROCESS, tokenizer, 12):
        assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["tokens"].shape == (6, 12) and batch["tokens"].dtype == np.int32
        assert batch["position"].dtype == batch["index"].dtype == np.int64
        assert [folder[i].name for i in batch["index"]] == batch["name"].tolist()
        for row, i in enumerate(batch["index"]):
            texts = [tokenizer(c, 12)[0].tolist() for c in folder[i].captions]
            assert batch["tokens"][row].tolist() in texts


def test_captions_vary_and_all_images_come(folder, tokenizer):
    batches = take(40, folder, PREPROCESS, tokenizer, 24)
    seen = {tuple(t) for b in batches for t in b["tokens"].tolist()}
    assert len(seen) > 2 * (COUNT - len(BAD))
    assert {i for b in batches for i in b["index"].tolist()} == set(range(COUNT)) - set(BAD)
    assert [p for b in batches for p in b["position"]] == list(range(240))


@pytest.mark.parametrize("workers, threads", [(0, 0), *(pytest.param(*n, marks=pytest.mark.check) for n in ((1, 0), (2, 2)))])
def test_workers_change_nothing(folder, tokenizer, workers, threads):
    expected = take(9, folder, PREPROCESS, tokenizer, 12)
    assert any(len(b["bad"]) for b in expected)
    assert_equal(expected, take(9, folder, PREPROCESS, tokenizer, 12, num_workers=workers, num_threads=threads))


def test_resuming_continues_the_stream(folder, tokenizer):
    expected = take(9, folder, PREPROCESS, tokenizer, 12)
    assert_equal(expected[4:], take(5, folder, PREPROCESS, tokenizer, 12, start_position=4 * 6))
    larger = take(3, folder, PREPROCESS, tokenizer, 12, start_position=24, batch_size=10)
    rows = np.concatenate([b["image"] for b in expected[4:]])
    assert (np.concatenate([b["image"] for b in larger]) == rows).all()


def test_processes_take_slices(folder, tokenizer):
    expected = take(5, folder, PREPROCESS, tokenizer, 12)
    parts = [take(5, folder, PREPROCESS, tokenizer, 12, process_index=p, process_count=3) for p in range(3)]
    for step, whole in enumerate(expected):
        for key in whole:
            assert np.concatenate([part[step][key] for part in parts]).tolist() == whole[key].tolist()


def test_seed_changes_order_and_augmentation(folder):
    a, b = (take(4, folder, PREPROCESS, None, seed=s) for s in (0, 1))
    assert np.concatenate([x["index"] for x in a]).tolist() != np.concatenate([x["index"] for x in b]).tolist()
    assert "tokens" not in a[0]


def test_bad_files_are_replaced_and_named(folder, tokenizer):
    collector = BadFiles()
    for batch in take(12, folder, PREPROCESS, tokenizer, 12):
        collector.add(batch)
        assert not set(batch["index"]) & set(BAD)
    assert set(collector.reasons) == {f"{i:02}.png" for i in BAD}
    assert collector.count >= 6
    text = collector.summary()
    assert text.startswith(f"2 unreadable image files ({collector.count} failed decodings)") and "04.png: cannot decode" in text
    assert BadFiles().summary() == "All images were readable."


class Broken(Source):
    """A source whose files fail with a chosen error."""

    name = "broken"

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return Record(f"{i}.jpg", self.fail, ("x",))

    def fail(self):
        raise self.error


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.check)])
def test_unreadable_source_stops_with_names(workers):
    with pytest.raises(ValueError, match=rf"(?s)position 0: .*{MAX_SUBSTITUTES} substitutes.*\d+\.jpg: disk gone"):
        take(1, Broken(OSError("disk gone")), PREPROCESS, None, num_workers=workers)


def test_bugs_are_not_reported_as_bad_files():
    with pytest.raises(KeyError, match="fault"):
        take(1, Broken(KeyError("fault")), PREPROCESS, None)


def test_complexity_must_be_known(folder):
    with pytest.raises(ValueError, match="no known complexity for 6 records"):
        take(1, folder, PREPROCESS, None, with_complexity=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 7, "process_count": 2}, "multiple of the 2 processes"),
        ({"batch_size": 0}, "batch_size"),
        ({"process_index": 1}, "process_index"),
        ({"start_position": -1}, "start_position"),
        ({"seed": -1}, "seed"),
        ({"num_workers": -1}, "num_workers"),
        ({"context_length": 0}, "context_length"),
    ],
)
def test_wrong_options(folder, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        take(1, folder, PREPROCESS, tokenizer, **({"context_length": 8} | options))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.check)])
def test_evaluation_keeps_order_and_skips_bad_files(folder, workers):
    preprocess = {"clip": Preprocess(16), "complexity": Preprocess(24, "squash")}
    with eval_batches(folder, preprocess, batch_size=5, num_workers=workers) as batches:
        batches = list(batches)
    assert [len(b["index"]) for b in batches] == [4, 5, 4, 5, 3]
    assert np.concatenate([b["index"] for b in batches]).tolist() == [i for i in range(COUNT) if i not in BAD]
    assert [name for b in batches for name, _ in b["bad"]] == [f"{i:02}.png" for i in BAD]
    for b in batches:
        assert b["captions"].tolist() == [folder[i].captions for i in b["index"]]
        assert np.isnan(b["complexity"]).all() and b["labels"].tolist() == [()] * len(b["index"])
        for key, p in preprocess.items():
            assert (b["images"][key] == [p.resize(folder[i].image()) for i in b["index"]]).all()


def test_evaluation_batches_may_be_empty(folder):
    with eval_batches(folder, {"a": Preprocess(8)}, batch_size=1) as batches:
        sizes = [b["images"]["a"].shape for b in batches]
    assert sizes[BAD[0]] == (0, 8, 8, 3) and sizes.count((1, 8, 8, 3)) == COUNT - len(BAD)


@pytest.mark.check
@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_that_ends_without_closing_is_quiet(folder, workers, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from icar_jax.data.sources.folders import CaptionFolder\n"
        "from icar_jax.data.images import Preprocess\n"
        "from icar_jax.data.loader.batches import train_batches\n"
        "if __name__ == '__main__':\n"
        f"    source = CaptionFolder({str(folder.root)!r})\n"
        f"    batches = train_batches(source, Preprocess(32), None, batch_size=4, seed=0, num_workers={workers})\n"
        "    kept = next(batches)\n"
        "    print(kept['image'].shape)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 32, 32, 3)\n", "")


@pytest.mark.check
def test_script_without_main_guard_fails_and_does_not_hang(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from icar_jax.data.images import Preprocess\n"
        "from icar_jax.data.loader.batches import train_batches\n"
        "from icar_jax.data.sources.folders import CaptionFolder\n"
        f"source = CaptionFolder({str(folder.root)!r})\n"
        "source.padding = 'x' * 1_000_000\n"
        "next(train_batches(source, Preprocess(8), None, batch_size=4, seed=0, num_workers=1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "if __name__ == '__main__'" in done.stderr
    assert "WorkerDied: a data worker of 1 ended with exit code 1" in done.stderr


def test_closed_iterators_raise(folder):
    batches = train_batches(folder, PREPROCESS, None, batch_size=4, seed=0)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="was closed"):
        next(batches)


def test_importing_the_pipeline_imports_neither_jax_nor_grain():
    code = "import sys, icar_jax.data.loader.batches, icar_jax.data.sources.folders; print({'jax', 'grain'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
