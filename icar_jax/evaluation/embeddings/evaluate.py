"""Evaluates embeddings from files, without a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from icar_jax.data.ratings.labels import merge_labels, read_labels
from icar_jax.errors import ConfigError, DataError
from icar_jax.evaluation.embeddings.files import Embeddings, read_embeddings, read_pairs, rows_of
from icar_jax.evaluation.metrics import category, comparison
from icar_jax.evaluation.metrics.bootstrap import RESAMPLES
from icar_jax.evaluation.metrics.folds import fold_metrics, fold_of
from icar_jax.evaluation.metrics.ranking import local_mesh
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, Distractors, chance_recall, ranks, summarise
from icar_jax.evaluation.records.embeddings import EmbeddingsEvaluation
from icar_jax.evaluation.records.retrieval import GalleryCounts, QueryCounts
from icar_jax.evaluation.report.embeddings_report import print_embeddings, recall_curves
from icar_jax.evaluation.report.table import write_metrics

Path_ = str | os.PathLike[str]


def evaluate_embeddings(
    images: Path_,
    texts: Path_,
    out: Path_,
    *,
    pairs: Path_ | None = None,
    distractors: tuple[Path_, Path_] | None = None,
    labels: Path_ | None = None,
    distractor_labels: Path_ | None = None,
    folds: int = 0,
    bootstrap: int = RESAMPLES,
    normalise: bool = True,
) -> EmbeddingsEvaluation:
    """Ranks texts and images by their embeddings; prints the table, writes metrics.json and recall.png to the folder `out`.

    images, texts: files as `files.read_embeddings` reads them. pairs: as for `files.read_pairs`; without, the array `image` of
    the texts, or row i of both. distractors: images and texts that are in the galleries, and neither queries nor targets.
    labels: file as for `read_labels`, joined with the names of the images. folds: also evaluates so many equal parts of the
    images, in order. normalise: vectors are brought to length 1, so that scores are cosines; False ranks by dot products.

    Memory: the vectors as float32, twice while they are read, and `ranking.SCORE_BYTES` for scores.

    Raises DataError and ConfigError for files and options that do not go together.
    """
    notes: list[str] = []
    if folds and distractors is not None:
        raise ConfigError("--folds are galleries of the evaluated images alone; leave out --distractors or --folds")
    if distractor_labels is not None and (labels is None or distractors is None):
        raise ConfigError("--distractor-labels needs --labels and --distractors")
    own, captions = _read(images, texts, normalise, notes)
    owner = _owner(own, captions, pairs, notes)
    bare = np.flatnonzero(np.bincount(owner, minlength=len(own)) == 0)
    if bare.size:
        raise DataError(
            f"{own.where}: {bare.size} of {len(own)} images have no text (first: row {bare[0]}); leave them out, or pass "
            "images that are no targets with --distractors"
        )
    if not 0 <= folds <= len(own):
        raise ConfigError(f"--folds {folds}: expected a number from 2 to the {len(own)} images")
    far = _distractors(distractors, own, labels, distractor_labels, normalise, notes)
    precise = None
    mesh = local_mesh()
    found = ranks(own.rows, captions.rows, owner, distractors=far, mesh=mesh)
    summary = summarise(found)
    if labels is not None:
        of_images = _labels(own, labels, notes)
        precise = category.precisions(own.rows, captions.rows, owner, of_images, distractors=far, mesh=mesh)
        of_categories = category.summarise(precise)
        summary = {d: summary[d] | of_categories[d] for d in DIRECTIONS}
    compared = comparison.intervals({"full": comparison.collect(found, precise)}, n=bootstrap)["full"]
    far_images, far_texts = (len(far.image_embed), len(far.text_embed)) if far is not None else (0, 0)
    record = EmbeddingsEvaluation(
        images=own.where,
        texts=captions.where,
        dimensions=own.rows.shape[1],
        gallery=GalleryCounts(
            images=len(own) + far_images,
            captions=len(captions) + far_texts,
            queries=QueryCounts(len(own), len(captions)),
            source=own.where,
            distractors=os.fspath(distractors[0]) if distractors is not None else None,
        ),
        **summary,
        intervals={d: {m: each.value for m, each in by_metric.items()} for d, by_metric in compared.items()},
        chance=_chance(len(own) + far_images, len(captions) + far_texts, len(captions) / len(own)),
        notes=notes,
    )
    if folds:
        fold = fold_of(np.arange(len(own)), folds, len(own))
        record.folds = fold_metrics(own.rows, captions.rows, owner, fold, n=bootstrap, mesh=mesh)
        notes.append(record.folds.sentence("these embeddings"))
    out = Path(out)
    write_metrics(record, out / "metrics.json")
    recall_curves(record, found, out / "recall.png")
    print_embeddings(record)
    return record


def _read(images: Path_, texts: Path_, normalise: bool, notes: list[str]) -> tuple[Embeddings, Embeddings]:
    read = [read_embeddings(path, normalise) for path in (images, texts)]
    first, second = read
    if first.rows.shape[1] != second.rows.shape[1]:
        raise DataError(
            f"{first.where} holds vectors of {first.rows.shape[1]} dimensions and {second.where} of {second.rows.shape[1]}; "
            "both must come from one model"
        )
    for each in read:
        if each.normalised:
            notes.append(f"{each.where}: vectors were brought to length 1, so scores are cosines (--dot keeps their lengths)")
    return first, second


def _owner(images: Embeddings, texts: Embeddings, pairs: Path_ | None, notes: list[str]) -> np.ndarray:
    if pairs is not None:
        return read_pairs(pairs, images, texts)
    if texts.image is not None:
        return rows_of(texts.image.tolist(), images, f"{texts.where}: image")
    if len(images) != len(texts):
        raise DataError(
            f"{images.where} has {len(images)} rows and {texts.where} {len(texts)}, and nothing says which belong together; "
            "pass --pairs FILE with the image of each text, or write it as the array `image` beside the texts"
        )
    notes.append(f"no --pairs: row i of {images.where} and row i of {texts.where} are taken for a pair")
    return np.arange(len(images))


def _distractors(
    files: tuple[Path_, Path_] | None,
    own: Embeddings,
    labels: Path_ | None,
    distractor_labels: Path_ | None,
    normalise: bool,
    notes: list[str],
) -> Distractors | None:
    if files is None:
        return None
    images, texts = _read(*files, normalise, notes)
    if images.rows.shape[1] != own.rows.shape[1]:
        raise DataError(
            f"{images.where} holds vectors of {images.rows.shape[1]} dimensions, {own.where} of {own.rows.shape[1]}"
        )
    if own.names is not None and images.names is not None and (shared := sorted({*own.names} & {*images.names})):
        raise DataError(f"{images.where}: {len(shared)} distractors are also in {own.where} (such as {shared[0]}); remove them")
    # Which image a distractor's text belongs to counts for its labels only.
    owner = _owner(images, texts, None, notes) if distractor_labels is not None else np.zeros(len(texts), np.int64)
    of_images = _labels(images, distractor_labels, notes) if distractor_labels is not None else ()
    return Distractors(images.rows, texts.rows, owner, of_images)


def _labels(images: Embeddings, file: Path_, notes: list[str]) -> Sequence[Sequence[str]]:
    if images.names is None:
        raise DataError(f"{images.where}: labels are joined by name, and it holds no names; add the array or column `names`")
    labels, note = merge_labels(images.names, None, read_labels(file), os.fspath(file))
    notes.append(note)
    return labels


def _chance(images: int, captions: int, own: float) -> dict[str, dict[str, float]]:
    by_k = {k: chance_recall(images, max(captions, images), k, own) for k in RECALL_AT}
    return {d: {f"r{k}": by_k[k][d] for k in RECALL_AT} for d in DIRECTIONS}
