"""WebDataset shards as people have them: names with dots, empty shards, images of other formats, texts that are not UTF-8."""

import pytest

from icar_jax.config import DataConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.sources.shards import ShardError
from icar_jax.data.sources.webdataset import WebDataset
from tests.support.shardfiles import picture, sample, write_tar


def test_empty_shards_are_named_and_skipped_within_the_share(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", sample("0", picture(0), "x"))
    (tmp_path / "1.tar").write_bytes(b"")
    folder = str(tmp_path)
    message = r"1 of 2 shards are empty \(0 bytes\): .*1\.tar.*config.data.bad_share=0.01 allows"
    with pytest.raises(ShardError, match=message):
        configured.open_split(DataConfig(source="webdataset", root=folder), ".")
    with caplog.at_level("WARNING"):
        source = configured.open_split(DataConfig(source="webdataset", root=folder, bad_share=0.5), ".")
    assert len(source) == 1 and source.shards.labels == ("0.tar",) and "1 of 2 shards are empty" in caplog.text
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="2 of 2 shards are empty"):
        WebDataset(folder, bad_share=1.0)


def test_names_with_dots_follow_the_rule_of_webdataset(tmp_path, caplog):
    members = [("2024.05.jpg", picture(0)), ("2024.05.txt", b"x"), *sample("a", picture(1), "one")]
    write_tar(tmp_path / "0.tar", members)
    with caplog.at_level("WARNING"):
        source = WebDataset(str(tmp_path))
    assert [source[i].name for i in range(len(source))] == ["0.tar/a"]
    assert "1 samples without an image or without txt and json are skipped. WebDataset's rule: the name" in caplog.text
    write_tar(tmp_path / "0.tar", members[:2])
    with pytest.raises(ShardError, match="WebDataset's rule: the name of a sample ends at the first dot"):
        WebDataset(str(tmp_path))


@pytest.mark.parametrize("extension, format", [("avif", "AVIF"), ("gif", "GIF"), ("bmp", "BMP"), ("TIFF", "TIFF")])
def test_members_of_other_formats(tmp_path, extension, format):
    write_tar(tmp_path / "0.tar", sample("0", picture(0, format=format), "one", extension))
    record = WebDataset(str(tmp_path))[0]
    assert record.image().size == (16, 12) and record.captions == ("one",)


def test_captions_that_are_not_utf_8_are_counted(tmp_path):
    latin = "größer".encode("latin-1")
    write_tar(
        tmp_path / "0.tar",
        [("0.jpg", picture(0)), ("0.txt", latin), ("1.jpg", picture(1)), ("1.txt", latin), ("1.json", b'{"caption": "one"}'),
         ("2.jpg", picture(2)), ("2.json", b'{"url": "u"}'), ("2.txt", latin)],
    )  # fmt: skip
    source, bad = WebDataset(str(tmp_path)), BadFiles()
    assert source[1].captions == ("one",)
    with eval_batches(source, {"a": Preprocess(8)}, batch_size=4) as batches:
        for batch in batches:
            bad.add(batch)
            assert batch["name"] == ["0.tar/1"]
    assert set(bad.reasons) == {"0.tar/0", "0.tar/2"}
    assert bad.reasons["0.tar/0"] == "0.tar/0: the text of its txt is not UTF-8 (byte 2: 0xf6)"
