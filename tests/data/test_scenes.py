"""The scenes data set: deterministic, true captions, held-out pairs, twins, known complexity."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from icar_jax.data.records import Record, Source
from icar_jax.data.scenes import HELDOUT_PAIRS, SPLITS, Scenes, contact_sheet, picture_folder
from icar_jax.data.scenes import grammar as g
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.data.sources.folders import CaptionFolder
from icar_jax.evaluation.metrics.colour_baseline import colour_histogram_baseline

SEEN_ONLY = ("train", "calibration", "relations")

# An independent parser of the captions: every informative word with its meaning.
SIZE = {"large": "large", "big": "large", "small": "small", "little": "small"}
TEXTURE = {
    "striped": "striped", "stripy": "striped", "dotted": "dotted", "spotted": "dotted",
    "checkered": "checkered", "checked": "checkered",
}  # fmt: skip
RELATION = {
    "left of": "left", "to the left of": "left", "right of": "right", "to the right of": "right", "above": "above",
    "over": "above", "below": "below", "under": "below", "inside": "inside", "in": "inside",
    "around": "around", "surrounding": "around",
}  # fmt: skip
INVERSE = g.OPPOSITE | {"inside": "around", "around": "inside"}
KIND = {
    "plain": "plain", "solid": "plain", "fading": "gradient", "shaded": "gradient", "cloudy": "cloudy",
    "clouds": "cloudy", "striped": "striped", "stripes": "striped", "dotted": "dotted", "dots": "dotted",
    "checkered": "checkered", "checks": "checkered",
}  # fmt: skip
NOUN = re.compile(
    rf"\b(an?) (?:({'|'.join(SIZE)}) )?(?:({'|'.join(TEXTURE)}) )?({'|'.join(g.COLOURS)}) ({'|'.join(g.SHAPES)})\b"
)


def scenes_of(split: str, n: int, **kw) -> list[g.Scene]:
    source = Scenes(split, n, **kw)
    return [source.scene(i) for i in range(n)]


def pairs(scene: g.Scene) -> set[tuple[str, str]]:
    return {(i.colour, i.shape) for i in scene.items}


def read(caption: str, scene: g.Scene) -> dict:
    """Checks a caption against the scene and returns what it mentions."""
    text = caption[0].lower() + caption[1:].rstrip(".")
    nouns = list(NOUN.finditer(text))
    found = []
    for noun in nouns:
        article, size, texture, colour, shape = noun.groups()
        item = next(i for i in scene.items if (i.colour, i.shape) == (colour, shape))
        assert article == ("an" if noun.group()[len(article) + 1] in "aeiou" else "a")
        assert size is None or SIZE[size] == item.size
        # A texture is stated unless the item is plain or the caption states no textures.
        assert texture is None or TEXTURE[texture] == item.texture
        found.append(item)
    assert {i.shape + i.colour for i in found} == {i.shape + i.colour for i in scene.items} and len(found) == len(nouns)
    rest = NOUN.sub("#", text)
    if scene.relation:
        word = re.search(rf"# ({'|'.join(sorted(RELATION, key=len, reverse=True))}) #", rest).group(1)
        relation = RELATION[word]
        if found[0] is scene.items[1]:
            relation = INVERSE[relation]
        assert {found[0], found[1]} == set(scene.items[:2]) and relation == scene.relation
    else:
        place = re.search(r"# (?:at|in|on|near) the ([a-z ]*?)(?: corner| edge)?(?= on a | against|,|$)", rest).group(1)
        assert {"middle": "centre"}.get(place, place) == scene.position
        rest = rest.replace(re.search(r"# (?:at|in|on|near) the [a-z ]*?(?= on a | against|,|$)", rest).group(), "#")
    kinds = {KIND[w] for w in re.findall("[a-z]+", rest) if w in KIND}
    assert kinds == {scene.background.kind}
    grounds = tuple(w for w in re.findall("[a-z]+", rest) if w in g.COLOURS)
    assert grounds in ((), scene.background.colours)
    amount = re.search(r"(a little|some|strewn with|full of) (?=confetti)|(strewn|full)", rest)
    if amount:
        many = amount.group().startswith(("strewn", "full"))
        assert scene.confetti and many == (len(scene.confetti) >= g.MANY_CONFETTI)
    return {"grounds": grounds, "confetti": bool(amount), "sizes": sum(noun.group(2) is not None for noun in nouns)}


def test_records_are_deterministic_and_complete():
    first, second = Scenes("train", 50, seed=3), Scenes("train", 500, seed=3)
    assert isinstance(first, Source) and len(first) == 50 and first.name == "scenes/train"
    for i in (0, 7, 49):
        a, b = first[i], second[i]
        assert isinstance(a, Record) and first.scene(i) == first.scene(i) == second.scene(i)
        assert (a.name, a.captions, a.complexity, a.labels) == (b.name, b.captions, b.complexity, b.labels)
        assert np.array_equal(np.asarray(a.image()), np.asarray(b.image()))
        assert a.labels == tuple(sorted({item.shape for item in first.scene(i).items}))
    assert len({first[i].name for i in range(50)}) == 50
    assert first.scene(0) != Scenes("train", 50, seed=4).scene(0)


def test_splits_share_no_random_stream():
    keys, nuisances = set(), set()
    for split in SPLITS:
        step = 2 if split == "relations" else 1  # twins share one intentionally
        scenes = scenes_of(split, 60)[::step]
        keys |= {s.noise_key for s in scenes}
        nuisances |= {s.nuisance for s in scenes}
    assert len(keys) == len(nuisances) == 5 * 60 + 30


@pytest.mark.parametrize("size", [32, 64, 65, 224, 512])
def test_image_shape_and_layout_at_every_size(size):
    source = Scenes("val", 4, image_size=size)
    for i in range(4):
        image = source[i].image()
        assert image.mode == "RGB" and image.size == (size, size)
        assert np.asarray(image).dtype == np.uint8
        clean = replace(source.scene(i), nuisance=replace(source.scene(i).nuisance, noise=0.0))
        small = draw_scene(clean, 32).astype(float)
        other = np.asarray(Scenes("val", 4)[i].image().resize((32, 32)) if size < 64 else image.resize((32, 32)))
        assert np.abs(small - other).mean() < 16


def test_heldout_pairs():
    held = set(HELDOUT_PAIRS)
    assert 0.08 <= len(held) / (len(g.SHAPES) * len(g.COLOURS)) <= 0.10
    for split in SEEN_ONLY:
        assert not any(pairs(s) & held for s in scenes_of(split, 2000))
    for split in ("val", "test"):
        seen = set().union(*(pairs(s) for s in scenes_of(split, 1000)))
        assert held <= seen
        assert not any(pairs(s) & held for s in scenes_of(split, 300, heldout=False))
    assert all(pairs(s) & held for s in scenes_of("heldout", 300))
    # All other pairs, and all words, occur in training.
    assert len(set().union(*(pairs(s) for s in scenes_of("train", 3000)))) == 100 - len(held)


def test_twins_differ_in_the_relation_only():
    source = Scenes("relations", 200)
    for k in range(0, 200, 2):
        a, b = source.scene(k), source.scene(k + 1)
        assert b.relation == g.OPPOSITE[a.relation] and len(a.items) >= 2
        back = tuple(replace(i, x=j.x, y=j.y) for i, j in zip(b.items[:2], a.items[:2]))
        assert replace(b, relation=a.relation, items=back + b.items[2:]) == a
        for one, two in zip(source[k].captions, source[k + 1].captions):
            words = [(p, q) for p, q in zip(one.split(), two.split(), strict=True) if p != q]
            assert len(words) == 1
            assert g.OPPOSITE[RELATION.get(words[0][0]) or words[0][0]] == (RELATION.get(words[0][1]) or words[0][1])
    assert not np.array_equal(np.asarray(source[0].image()), np.asarray(source[1].image()))


@pytest.mark.parametrize("split", list(SPLITS))
def test_captions_are_true(split):
    source = Scenes(split, 500)
    for i in range(500):
        scene, captions = source.scene(i), source[i].captions
        assert len(captions) == len(set(captions)) == 3
        assert all(len(c.split()) <= 26 and c[0].isupper() and c.endswith(".") for c in captions)
        said = [read(c, scene) for c in captions]
        for complete in said[:2]:
            assert complete["grounds"] == scene.background.colours and complete["sizes"] == len(scene.items)
            assert complete["confetti"] == bool(scene.confetti)
        for c in captions[:2]:
            textures = [m.group(3) for m in NOUN.finditer(c[0].lower() + c[1:])]
            assert sum(t is not None for t in textures) == sum(i.texture != "plain" for i in scene.items)


def test_the_brightness_map_affects_only_the_background():
    light = np.tile(np.linspace(0.4, 1.4, 64, dtype=np.float32), (64, 1))
    still = g.Nuisance(0, 0, 1, 0, 0, 1, 0, 0, 0)
    axis = (np.arange(64) + 0.5) / 64
    for scene in scenes_of("val", 20):
        item = replace(scene.items[0], shape="square", texture="plain")
        scene = replace(scene, nuisance=still, confetti=(), items=(item,), relation=None)
        plain, lit = draw_scene(scene, 64), draw_scene(scene, 64, light)
        np.testing.assert_array_equal(draw_scene(scene, 64, np.ones_like(light)), plain)
        away = np.hypot(axis - item.x, axis[:, None] - item.y)
        far, inside = away > 1.5 * item.radius, away < 0.5 * item.radius
        expected = np.clip(plain * light[..., None], 0, 255)
        assert np.abs(lit[far] - expected[far]).max() <= 2.5  # both were rounded down
        np.testing.assert_array_equal(lit[inside], plain[inside])


def test_relations_and_sizes_hold_in_the_image():
    for scene in scenes_of("val", 1500):
        for item in scene.items:
            assert item.radius > 0.19 if item.size == "large" else item.radius < 0.135
        if scene.relation is None:
            item = scene.items[0]
            row, column = divmod(g.POSITIONS.index(scene.position), 3)
            assert abs(item.x - (0.26 + 0.24 * column)) < 0.05 and abs(item.y - (0.26 + 0.24 * row)) < 0.05
            continue
        a, b = scene.items[:2]
        dx, dy = a.x - b.x, a.y - b.y
        if scene.relation == "inside":
            assert np.hypot(dx, dy) < 1e-9 and a.radius < 0.45 * b.radius and b.shape in g.CONTAINERS
        else:
            along, across = (dx, dy) if scene.relation in ("left", "right") else (dy, dx)
            assert abs(along) > 0.4 and abs(across) < 0.1
            assert (along < 0) == (scene.relation in ("left", "above"))
        for third in scene.items[2:]:
            assert all(np.hypot(third.x - i.x, third.y - i.y) > 0.38 for i in (a, b))


def test_items_contrast_with_their_background():
    for scene in scenes_of("val", 1500):
        for item in scene.items:
            assert all(item.colour not in g.CLOSE[c] for c in scene.background.colours)
        if scene.relation == "inside":
            assert scene.items[0].colour not in g.CLOSE[scene.items[1].colour]


def test_gallery_is_identified_by_its_captions():
    source = Scenes("val", 500)
    assert len({source[i].captions[0] for i in range(500)}) >= 498


def test_every_value_occurs():
    scenes = scenes_of("train", 2000)
    items = [i for s in scenes for i in s.items]
    for values, known in (
        ({i.shape for i in items}, g.SHAPES), ({i.colour for i in items}, g.COLOURS),
        ({i.size for i in items}, g.SIZES), ({i.texture for i in items}, g.TEXTURES),
        ({s.relation for s in scenes if s.relation}, g.RELATIONS), ({s.background.kind for s in scenes}, g.BACKGROUNDS),
        ({s.position for s in scenes if s.position}, g.POSITIONS), ({len(s.items) for s in scenes}, (1, 2, 3)),
        ({c for s in scenes for c in s.background.colours}, g.COLOURS),
    ):  # fmt: skip
        assert values == set(known)


def test_complexity_is_known_and_spread():
    values = np.array([s.complexity for s in scenes_of("train", 2000)])
    assert values.min() >= 0 and values.max() <= 1
    assert np.histogram(values, 4, (0, 1))[0].min() > 0.2 * 2000
    assert np.histogram(values, 10, (0, 1))[0].min() > 0.06 * 2000
    assert g.complexity(1, "plain", 0, 1, 0) == 0
    assert g.complexity(3, "checkered", 3, 3, g.MAX_CONFETTI) == pytest.approx(1)


def test_nuisance_is_independent_of_complexity():
    scenes = scenes_of("train", 3000)
    values = np.array([s.complexity for s in scenes])
    for name in g.Nuisance.__dataclass_fields__:
        nuisance = np.array([getattr(s.nuisance, name) for s in scenes])
        assert nuisance.std() > 0 and abs(np.corrcoef(values, nuisance)[0, 1]) < 0.1, name


def test_user_errors():
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, calibration, val, test, relations, heldout"):
        Scenes("dev", 10)
    for split, kw, message in (
        ("train", {"size": 0}, "at least 1"), ("relations", {"size": 3}, "even"),
        ("train", {"size": 2, "seed": -1}, "seed"), ("train", {"size": 2, "image_size": 16}, "32 to 512"),
        ("train", {"size": 2, "heldout": True}, "held-out"), ("heldout", {"size": 2, "heldout": False}, "held-out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Scenes(split, **kw)
    for i in (5, -1):
        with pytest.raises(IndexError, match="out of range for 5"):
            Scenes("val", 5)[i]


def test_contact_sheet(tmp_path):
    contact_sheet(Scenes("val", 6), 6, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="between 1 and 6"):
        contact_sheet(Scenes("val", 6), 7, tmp_path / "none.png")


def test_a_folder_of_scenes_reads_as_they_were_drawn(tmp_path):
    scenes, folder = Scenes("val", 12), tmp_path / "gallery"
    for _ in range(2):  # twice into the same folder
        picture_folder(scenes, 12, folder)
        found = CaptionFolder(folder, None)
        assert [found[i].captions for i in range(12)] == [scenes[i].captions for i in range(12)]
        assert all(np.array_equal(found[i].image(), scenes[i].image()) for i in range(12))
    (folder / "images" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds images/holiday\.png"):
        picture_folder(scenes, 12, folder)
    with pytest.raises(ValueError, match="between 1 and 12 images"):
        picture_folder(scenes, 13, tmp_path / "none")


def test_drawing_is_fast_enough_for_training():
    """Drawing takes at most five times as long as decoding a 256-pixel JPEG in the same run."""
    scenes = scenes_of("train", 100)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(stream, "jpeg")

    def processor_time(work):
        work(scenes[0])
        started = time.process_time()
        for scene in scenes:
            work(scene)
        return time.process_time() - started

    drawing = processor_time(lambda scene: draw_scene(scene, 64))
    decoding = processor_time(lambda _: Image.open(io.BytesIO(stream.getvalue())).convert("RGB").load())
    assert drawing < 5 * decoding


def test_colour_baseline_finds_colours_but_not_scenes():
    """The baseline solves captions of pure colour, but not those of scenes."""
    rng = np.random.default_rng(0)
    palette = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (240, 240, 240)}
    names = list(palette)
    grain = rng.integers(0, 9, (40, 8, 8, 3), np.uint8)
    images = [np.array(palette[names[k % 4]], np.uint8) + grain[k] for k in range(40)]
    captions = [(f"a {names[k % 4]} wall", f"all {names[k % 4]}") for k in range(40)]
    easy = colour_histogram_baseline(images, captions, images[:4], captions[:4])
    assert easy["text_to_image"]["r1"] == easy["image_to_text"]["r1"] == 100

    train, val = Scenes("train", 1000), Scenes("val", 250)
    hard = colour_histogram_baseline(
        (r.image() for r in train), [r.captions for r in train], (r.image() for r in val), [r.captions for r in val]
    )
    assert hard["text_to_image"]["r1"] < 8 and 0 <= hard["image_to_text"]["r10"] < 50


def test_colour_baseline_errors():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="train: 1 images but captions for 2"):
        colour_histogram_baseline([image], [("a",), ("b",)], [image], [("a",)])
    with pytest.raises(ValueError, match="test image 0: expected uint8"):
        colour_histogram_baseline([image], [("a",)], [image.astype(float)], [("a",)])
    with pytest.raises(ValueError, match="no caption"):
        colour_histogram_baseline([image], [("a",)], [image], [()])
    with pytest.raises(ValueError, match="found none"):
        colour_histogram_baseline([], [], [image], [("a",)])
