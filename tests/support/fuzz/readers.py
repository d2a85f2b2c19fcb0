"""Every reader of files and settings, with valid inputs to change and handmade ones whose answer is known."""

from __future__ import annotations

import functools

from tests.support.fuzz.descriptions import (
    ABSURD,
    bundle_file,
    change_setting,
    corpus_seeds,
    filter_seeds,
    read_bundle,
    read_corpus,
    read_filter,
    read_run,
    read_setting,
    read_shard,
    run_seeds,
    setting_seeds,
    shard_seeds,
    sources,
)
from tests.support.fuzz.media import (
    captions,
    embedding_seeds,
    handmade_images,
    image_seeds,
    label_seeds,
    manifest_seeds,
    pair_seeds,
    parquet_seeds,
    rating_seeds,
    read_captions,
    read_embedding_file,
    read_image,
    read_label_file,
    read_manifest,
    read_pair_file,
    read_parquet,
    read_rating_file,
    read_released,
    read_tar,
    released_seeds,
    tar_seeds,
)
from tests.support.fuzz.mutations import change_bytes, change_json, change_lines
from tests.support.fuzz.reader import DEPTHS, NOT_OBJECTS, Reader, refused
from tests.support.fuzz.weights import (
    handmade_merges,
    handmade_npz,
    handmade_safetensors,
    handmade_torch,
    merges_seeds,
    npz_seeds,
    read_npz_file,
    read_sentencepiece,
    read_tokenizer,
    read_vocab,
    read_weight_file,
    safetensors_seeds,
    sentencepiece_seeds,
    tokenizer_seeds,
    torch_seeds,
    vocab_seeds,
)


def make_readers() -> list[Reader]:
    p = functools.partial
    json_faults = p(refused, **NOT_OBJECTS)
    bundle = [
        Reader(
            f"bundle {file}", p(bundle_file, file), p(read_bundle, file), change, refuses_changes=hashed, make_handmade=cases
        )
        for file, change, hashed, cases in (
            ("icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("clip/icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("complexity/icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("clip/params.safetensors", change_bytes, True, dict),
            ("clip/tokenizer.json", change_json, True, dict),
        )
    ]
    torch = ("zip.pt", "legacy.bin", "nested.pt", "nested_legacy.bin", "untyped.pt", "script.pt", "trace.pt")
    return [
        Reader("images", image_seeds, read_image, change_bytes, 1_700, refuses_cut=True, make_handmade=handmade_images),
        Reader("safetensors", safetensors_seeds, read_weight_file, change_bytes, refuses_cut=True,
               make_handmade=handmade_safetensors),
        Reader("torch", p(torch_seeds, torch), read_weight_file, change_bytes, 512, refuses_cut=True,
               make_handmade=handmade_torch),
        Reader("npz", npz_seeds, read_npz_file, change_bytes, refuses_cut=True,
               make_handmade=handmade_npz),
        *bundle,
        Reader("corpus.json", corpus_seeds, read_corpus, change_json, make_handmade=json_faults),
        Reader("corpus shard", shard_seeds, read_shard, change_bytes, refuses_cut=True),
        Reader("config.json", run_seeds, read_run, change_json, make_handmade=json_faults),
        Reader("settings", setting_seeds, read_setting, change_setting),
        Reader("captions.json", p(captions, "json"), p(read_captions, "dataset_tiny.json"), change_json,
               make_handmade=json_faults),
        Reader("captions.csv", p(captions, "csv"), p(read_captions, "captions.csv"), change_lines),
        Reader("captions.jsonl", p(captions, "jsonl"), p(read_captions, "captions.jsonl"), change_lines,
               make_handmade=p(refused, nested=DEPTHS, list=b"[]")),
        Reader("captions.token", p(captions, "token"), p(read_captions, "results.token"), change_lines),
        Reader("captions beside", p(captions, "beside"), p(read_captions, "images/a.txt"), change_lines),
        Reader("released labels", released_seeds, read_released, change_json,
               make_handmade=p(refused, nested=DEPTHS, number=b"3")),
        Reader("manifest", manifest_seeds, read_manifest, change_lines),
        *(Reader(f"embeddings.{kind}", p(embedding_seeds, kind), p(read_embedding_file, kind), change_bytes, 1_700)
          for kind in ("npz", "parquet")),
        *(Reader(f"pairs.{kind}", p(pair_seeds, kind), p(read_pair_file, kind), change)
          for kind, change in (("json", change_json), ("csv", change_lines))),
        *(Reader(f"ratings.{kind}", p(rating_seeds, kind), p(read_rating_file, f"labels.{kind}"), change)
          for kind, change in (("json", change_json), ("csv", change_lines), ("txt", change_lines))),
        Reader("labels", label_seeds, read_label_file, change_json,
               make_handmade=p(refused, list=b"[]", nested=DEPTHS, number=b"3")),
        Reader("tar", tar_seeds, read_tar, change_bytes, 1_700),
        Reader("parquet", parquet_seeds, read_parquet, change_bytes, 1_700, refuses_cut=True),
        Reader("tokenizer.json", tokenizer_seeds, p(read_tokenizer, "tokenizer.json"), change_json, 512),
        Reader("merges", merges_seeds, p(read_tokenizer, "merges.txt.gz"), change_bytes, 512,
               make_handmade=handmade_merges),
        Reader("sentencepiece", sentencepiece_seeds, read_sentencepiece, change_bytes),
        Reader("vocab.txt", vocab_seeds, read_vocab, change_lines),
        *sources(),
        Reader("filters", filter_seeds, read_filter, change_bytes),
    ]  # fmt: skip


READERS = {reader.name: reader for reader in make_readers()}
