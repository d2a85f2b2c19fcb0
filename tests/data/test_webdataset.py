"""WebDataset shards: grouping, random access, the cached index, damaged tars, and the same batches on any workers."""

import gzip
import io
import itertools
import json
import os
import pickle
import stat
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data import configured
from icar_jax.data.images import ImageError, Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches, train_batches
from icar_jax.data.sources import tar_index
from icar_jax.data.sources.shards import ShardError
from icar_jax.data.sources.tar import TarDamage, members
from icar_jax.data.sources.tar_index import group
from icar_jax.data.sources.webdataset import WebDataset
from tests.support.shardfiles import picture, sample, write_shards, write_tar


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three shards of seven images in train/, one of five in val/."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", 3, 7)
    write_shards(root / "val", 1, 5, first=9)
    return root


def test_every_sample_is_found_with_its_image_and_caption(root):
    source = WebDataset(str(root), "train")
    assert len(source) == 21 and source.name == f"{root.name}/train"
    for i in [*range(21), *reversed(range(21))]:
        record = source[i]
        assert record.name == f"{i // 7:05}.tar/{i:06}" and record.captions == (f"picture {i}",)
        assert (np.asarray(record.image()) == np.asarray(Image.open(io.BytesIO(picture(i))))).all()
    with pytest.raises(IndexError):
        source[21]
    with pytest.raises(IndexError):
        source[-1]


def test_forms_of_the_root(root):
    folder = root / "train"
    whole = [r.name for r in (lambda s: [s[i] for i in range(len(s))])(WebDataset(str(root), "train"))]
    for form, split in [(folder, "."), (folder / "*.tar", "."), (folder / "{00000..00002}.tar", "."),
                        (folder / "{00000,00001,00002}.tar", "."), (root / "{00000..00002}.tar", "train")]:  # fmt: skip
        source = WebDataset(str(form), split)
        assert [source[i].name for i in range(len(source))] == whole
    assert len(WebDataset(str(folder / "00001.tar"), ".")) == 7
    assert len(WebDataset(str(root), "train+val")) == 26


@pytest.mark.parametrize(
    "form, split, message",
    [
        ("", "test", "no subfolder 'test' for the split; it has .*train"),
        ("", ".", r"no \.tar files at .*found train, val"),
        ("train/{00000..00009}.tar", ".", r"7 of 10 shards do not exist, first .*00003\.tar"),
        ("train/{9..1}.tar", ".", "counts down"),
        ("train/*.zip", ".", "no .tar files"),
        ("train/{00000,00000}.tar", ".", "twice"),
    ],
)
def test_missing_shards(root, form, split, message):
    with pytest.raises(ConfigError, match=message):
        WebDataset(os.path.join(root, form), split)


def test_buckets_are_refused():
    with pytest.raises(ConfigError, match="mount the bucket"):
        WebDataset("gs://bucket/{000..009}.tar", ".")


def test_compressed_shards_are_refused(tmp_path):
    plain = write_tar(tmp_path / "a" / "0.tar", sample("0", picture(0), "x"))
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b" / "0.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ConfigError, match="decompress"):
        WebDataset(str(tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"is not a \.tar file; .*decompress"):
        WebDataset(str(packed))
    packed.rename(tmp_path / "b" / "0.tar")
    with pytest.raises(ShardError, match=r"0\.tar: compressed with gzip"):
        WebDataset(str(tmp_path / "b"))


# Grouping, compared with the standard library ------------------------------------------------------------

NAMES = st.lists(
    st.tuples(st.sampled_from(["a", "b", "dir/a", "dir.x/b", "c" * 120, "ü", ".hidden", "d" * 90 + "/" + "e" * 60]),
              st.sampled_from(["jpg", "JPG", "png", "txt", "json", "seg.png", "cls", "tar.gz", ""])),
    max_size=14, unique=True,
)  # fmt: skip


def plain_groups(path):
    """Returns key, extensions, first header and end of every sample, with tarfile and groupby."""
    found = []
    with tarfile.open(path) as archive:
        previous = 0
        for member in archive:
            file = member.name.rpartition("/")[2]
            stem, dot, extension = file.partition(".")
            if stem and dot:
                key = member.name[: len(member.name) - len(extension) - 1]
                found.append((key, extension.lower(), previous, member.offset_data + member.size))
            previous = member.offset_data + -(-member.size // 512) * 512
    return [(key, list(rows)) for key, rows in itertools.groupby(found, key=lambda row: row[0])]


@settings(max_examples=80, deadline=None)
@given(
    names=NAMES,
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    sizes=st.integers(0, 99),
)
def test_grouping_agrees_with_the_standard_library(tmp_path_factory, names, format, sizes):
    content = bytes(sizes * 13)
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    names = [f"{stem}.{extension}" if extension else stem for stem, extension in names]
    try:
        write_tar(path, [(name, content) for name in names], format)
    except (ValueError, UnicodeError):
        return  # not expressible in this format
    raw = path.read_bytes()
    read = lambda offset, length: raw[offset : offset + length]
    expected = plain_groups(path)
    keys = [key for key, _ in expected]
    double = any(len({row[1] for row in rows}) < len(rows) for _, rows in expected)
    if len(set(keys)) < len(keys) or double:
        with pytest.raises(TarDamage, match="not contiguous|two members"):
            group(members(read, len(raw)))
        return
    assert [m.name for m in members(read, len(raw))] == names
    usable = [rows for _, rows in expected
              if {r[1] for r in rows} & set(tar_index.IMAGES) and {r[1] for r in rows} & {"txt", "json"}]  # fmt: skip
    spans, left_out = group(members(read, len(raw)))
    assert left_out == len(expected) - len(usable)
    assert spans == [(rows[0][2], rows[-1][3]) for rows in usable]
    for start, end in spans:  # a sample can be read from its own bytes
        part = raw[start:end]
        assert len(list(members(lambda o, n: part[o : o + n], len(part), part=True))) >= 2


def test_captions_txt_first_then_json(tmp_path):
    image = picture(0)
    several = json.dumps({"caption": ["one", " ", "two"], "captions": "three"}).encode()
    write_tar(
        tmp_path / "0.tar",
        [("0.jpg", image), ("0.json", several), ("0.txt", b" first \n"),
         ("1.jpg", image), ("._1.txt", b"hidden"), ("1.json", several), ("1.txt", b"  "), ("README", b""),
         ("2.png", image), ("2.json", several),
         ("3.webp", image), ("3.txt", "größer".encode()),
         ("4.jpg", image), ("4.json", b'{"caption": null, "url": "u"}'),
         ("5.jpg", image), ("5.json", b"{"),
         ("6.jpg", image), ("6.cls", b"1"),
         ("7.txt", b"without a picture")],
    )  # fmt: skip
    source = WebDataset(str(tmp_path))
    assert [source[i].captions for i in range(4)] == [("first",), ("one", "two", "three"), ("one", "two", "three"), ("größer",)]
    assert [source[i].name for i in range(4)] == [f"0.tar/{i}" for i in range(4)]
    assert len(source) == 6  # 6 has no caption file, 7 no image
    with pytest.raises(ImageError, match=r"0\.tar/4: no caption in its txt or json \(the json has caption, url\)"):
        source[4].image()
    with pytest.raises(ImageError, match=r"0\.tar/5: no caption in its json"):
        source[5].image()


def test_records_without_a_caption_or_an_image_are_replaced_and_named(tmp_path):
    rows = [m for n in range(12) for m in sample(f"{n:02}", picture(n), f"picture {n}")]
    rows += [("12.jpg", b"not a picture"), ("12.txt", b"x"), ("13.jpg", picture(13)), ("13.txt", b"")]
    write_tar(tmp_path / "0.tar", rows)
    bad = BadFiles()
    with train_batches(WebDataset(str(tmp_path)), Preprocess(8), None, batch_size=7, seed=1) as batches:
        for _ in range(8):
            batch = next(batches)
            bad.add(batch)
            assert not set(batch["index"]) & {12, 13}
    assert set(bad.reasons) == {"0.tar/12", "0.tar/13"}


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(root, tmp_path, change):
    raw = (root / "train" / "00000.tar").read_bytes()
    write_tar(tmp_path / "0.tar", sample("0", picture(0), "x"))
    (tmp_path / "1.tar").write_bytes(change(raw))
    return str(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw[:4200], r"1\.tar: cut off after 4200 bytes, inside '00000\d\."),
        (lambda raw: raw[:1536], r"1\.tar: cut off after 1536 bytes: the end-of-archive mark is missing"),
        (lambda raw: raw[:100], "cut off after 100 bytes"),
        (lambda raw: raw[:1] + b"\xff" + raw[2:], r"not a tar header at byte 0: the checksum"),
        (lambda raw: b"<html>no such file</html>".ljust(2048), "not a tar header at byte 0"),
    ],
)
def test_damaged_shards_are_named_and_counted(root, tmp_path, change, message):
    with pytest.raises(ShardError, match=f"(?s)1 of 2 shards cannot be used:.*{message}"):
        WebDataset(damaged(root, tmp_path, change))


def test_many_damaged_shards(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.tar").write_bytes(b"x" * 600)
    with pytest.raises(ShardError, match="32 of 40 shards cannot be used") as error:  # the rest is not scanned
        WebDataset(str(tmp_path))
    assert str(error.value).count("\n") == 5


def test_separated_members_and_kinds_without_random_access(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", [("0.jpg", b""), ("1.jpg", b""), ("0.txt", b""), ("1.txt", b"")])
    with pytest.raises(ShardError, match="sample '0' are not contiguous.*--sort=name"):
        WebDataset(str(tmp_path / "a"))
    write_tar(tmp_path / "b" / "0.tar", [("0.jpg", b""), ("0.JPG", b""), ("0.txt", b"")])
    with pytest.raises(ShardError, match="sample '0' has two members with the extension .jpg"):
        WebDataset(str(tmp_path / "b"))
    write_tar(tmp_path / "c" / "0.tar", [("0.mp4", b""), ("0.txt", b"")])
    with pytest.raises(ShardError, match="no sample has an image.*1 samples lack one"):
        WebDataset(str(tmp_path / "c"))


# The index ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch):
    """Names of the shards that are scanned, in any order."""
    seen = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: (seen.append(os.path.basename(path)), scan(path))[1])
    return seen


def test_only_new_and_changed_shards_are_scanned(tmp_path, scans):
    write_shards(tmp_path, 3, 4)
    assert len(WebDataset(str(tmp_path))) == 12 and sorted(scans) == ["00000.tar", "00001.tar", "00002.tar"]
    scans.clear()
    assert len(WebDataset(str(tmp_path))) == 12 and not scans
    write_shards(tmp_path, 1, 4, first=3)
    write_tar(tmp_path / "00001.tar", sample("x", picture(0), "changed"))
    source = WebDataset(str(tmp_path))
    assert sorted(scans) == ["00001.tar", "00003.tar"] and len(source) == 13
    assert source[4].captions == ("changed",) and source[12].captions == ("picture 15",)
    scans.clear()
    assert len(WebDataset(str(tmp_path / "{00000..00001}.tar"))) == 5 and not scans
    for index in tmp_path.glob(".icar_index_*"):
        index.write_bytes(index.read_bytes()[:-9])
    assert len(WebDataset(str(tmp_path))) == 13 and len(scans) == 4
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, scans):
    write_shards(tmp_path, 2, 3)
    refuse = lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    monkeypatch.setattr(tar_index.os, "replace", refuse)
    mode = tmp_path.stat().st_mode
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        source = WebDataset(str(tmp_path))
    finally:
        tmp_path.chmod(mode)
    assert not list(tmp_path.glob(".icar_index_*")) and len(scans) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].name for i in range(6)] == [source[i].name for i in range(6)]


def test_a_copy_for_a_worker_is_small_and_checks_the_index(tmp_path):
    write_shards(tmp_path, 2, 30)
    source = WebDataset(str(tmp_path))
    assert len(pickle.dumps(source)) < 2000  # does not contain the 60 byte ranges
    copy = pickle.dumps(source)
    index = next(tmp_path.glob(".icar_index_*"))
    assert 60 * 16 < index.stat().st_size < 60 * 16 + 200  # 16 bytes per sample
    index.write_bytes(index.read_bytes().replace(b'"00000.tar"', b'"00009.tar"'))
    with pytest.raises(ShardError, match="changed while in use"):
        pickle.loads(copy)


# A configuration's sources, and their order ---------------------------------------------------------------------------------


def test_sources_of_a_configuration_are_disjoint(root):
    data = DataConfig(source="webdataset", root=str(root), calibration_size=4)
    parts = [
        configured.train_source(data),
        configured.calibration_source(data),
        configured.eval_source(data, EvalConfig(split="val")),
    ]
    names = [{part[i].name for i in range(len(part))} for part in parts]
    assert [len(n) for n in names] == [17, 4, 5] and len(set.union(*names)) == 26
    with pytest.raises(ConfigError, match="not held out"):
        configured.eval_source(data, EvalConfig(split="train"))
    data.calibration_size = 21
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        configured.train_source(data)


def test_the_fingerprint_follows_the_shards(tmp_path):
    write_shards(tmp_path / "train", 2, 5)
    data = DataConfig(source="webdataset", root=str(tmp_path), calibration_size=2)
    before = configured.fingerprint(configured.train_source(data))
    assert before == configured.fingerprint(configured.train_source(data)) and before["images"] == 8
    data.calibration_size = 3
    assert configured.fingerprint(configured.train_source(data)) != before
    data.calibration_size = 2
    write_tar(tmp_path / "train" / "00001.tar", [m for n in range(5) for m in sample(f"{n}", picture(n, 20), "x")])
    assert configured.fingerprint(configured.train_source(data)) != before


def stream(source, steps, process_count=1, start=0, workers=0):
    """Batches of `steps` steps, the parts of all processes joined in order."""
    parts = []
    for process in range(process_count):
        with train_batches(
            source, Preprocess(8), None, batch_size=4, seed=5, start_position=start, num_workers=workers,
            process_index=process, process_count=process_count,
        ) as batches:  # fmt: skip
            parts.append([next(batches) for _ in range(steps)])
    return [{key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.check)])
def test_two_processes_of_two_workers_continue_one_of_none(root, workers):
    data = DataConfig(source="webdataset", root=str(root), calibration_size=3)
    source = configured.train_source(data)
    expected = stream(source, 7)
    continued = stream(source, 4, process_count=2, start=3 * 4, workers=workers)
    for a, b in zip(expected[3:], continued, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].tolist() == b[key].tolist(), key


def test_evaluation_reads_shards_in_order(root):
    with eval_batches(WebDataset(str(root), "val"), {"a": Preprocess(8)}, batch_size=2) as batches:
        names = [name for batch in batches for name in batch["name"]]
    assert names == [f"00009.tar/{n:06}" for n in range(45, 50)]
