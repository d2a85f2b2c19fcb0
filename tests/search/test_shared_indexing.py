"""Files of equal bytes and their captions, special files in folders, and two runs that index the same folder at once."""

import os
import shutil

import pytest

from icar_jax.search.opening import open_store
from icar_jax.search.store import Store
from tests.support.collected import draw, index, rows

pytest.importorskip("lancedb")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def captions(store):
    return {os.path.basename(path): caption for path, (caption,) in rows(store, "caption").items()}


def test_a_caption_follows_a_moved_file_and_not_equal_bytes(model, tmp_path, store):
    pictures = draw(tmp_path / "pictures", 4)
    names = sorted(os.listdir(pictures))
    (tmp_path / "c.csv").write_text("file,caption\n" + "".join(f"{name},of {name}\n" for name in names))
    shutil.copy(pictures / names[0], pictures / "twin.png")  # in the same run
    index(model, pictures, store, captions=tmp_path / "c.csv")
    assert captions(store) == {**{name: f"of {name}" for name in names}, "twin.png": None}
    shutil.copy(pictures / names[1], pictures / "late.png")
    os.rename(pictures / names[2], pictures / "moved.png")
    shutil.copy(pictures / names[3], pictures / names[0])  # a file with other bytes keeps its own caption
    index(model, pictures, store)
    found = captions(store)
    assert (found["late.png"], found["moved.png"], found[names[0]]) == (None, f"of {names[2]}", f"of {names[0]}")


def test_two_runs_at_once_count_what_each_added(model, tmp_path, store, monkeypatch):
    index(model, draw(tmp_path / "first", 1, seed=9), store)
    pictures = draw(tmp_path / "pictures", 12)
    first, put = [], Store.put

    def other_run_first(self, table):
        if not first:
            first.append(None)
            first.append(index(model, pictures, store))
        return put(self, table)

    monkeypatch.setattr(Store, "put", other_run_first)
    second = index(model, pictures, store)
    assert (first[1].added, first[1].kept) == (12, 0) and (second.added, second.kept, second.updated) == (0, 12, 0)
    assert second.total == open_store(store).count() == 13


def test_special_files_are_listed_and_hidden_files_are_not(model, tmp_path, store):
    pictures = draw(tmp_path / "pictures", 2)
    os.mkfifo(pictures / "pipe.jpg")
    (pictures / "zero.png").symlink_to("/dev/zero")
    (pictures / "._0_000.png").write_bytes(b"thumbnail")
    for _ in range(2):  # the second run looks at the bad files again
        done = index(model, pictures, store)
        assert done.total == 2 and done.left_out == "Left out: 1 hidden images"
    reasons = {os.path.basename(row["path"]): row["reason"] for row in open_store(store).bad_rows().to_pylist()}
    kinds = {"pipe.jpg": "found a pipe", "zero.png": "found a device"}
    assert reasons == {name: f"expected a regular file, {what}" for name, what in kinds.items()}
