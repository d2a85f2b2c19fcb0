"""Routing over a mesh: eight devices give the results of one for any number of images, without compiling after warm-up."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax.config import MeshConfig
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.evaluation.routing.thresholds import thresholds_for_shares
from icar_jax.inference.files.corpus import open_corpus
from icar_jax.parallel.mesh import make_mesh
from tests.support.programs import ROOT, environment

SHARDED = """
import sys
import jax, numpy as np
import icar_jax
from icar_jax import cli
from icar_jax.config import MeshConfig
from icar_jax.inference.forward import count_compilations
from icar_jax.parallel.mesh import make_mesh

assert jax.device_count() == 8
model = icar_jax.load(sys.argv[1], batch_size=16, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
model.warm_up()
images, out = np.load(sys.argv[2]), {}
with count_compilations() as compiled:
    for n in (1, 16, len(images)):
        routed = model.route(list(images[:n]))
        out |= {f"embeddings_{n}": routed.embeddings, f"scores_{n}": routed.scores, f"exits_{n}": routed.exits}
    out["text"] = model.encode_text(["a small red circle", "stripes"])
    assert compiled() == 0 and routed.stats.compilations == 0, compiled()
tower = model.towers[model.exits[0]]
placed = tower.placement.batch(np.zeros((16, *images.shape[1:]), np.uint8))
assert len({shard.device for shard in placed.addressable_shards}) == 8 and placed.addressable_shards[0].data.shape[0] == 2
try:
    icar_jax.load(sys.argv[1], batch_size=12, mesh=make_mesh(MeshConfig()))
except ValueError as error:
    assert "8 batch shards" in str(error)
else:
    raise AssertionError("12 images were sharded over 8 devices")
np.savez(sys.argv[3], **out)
embed = ["embed", sys.argv[4], "--checkpoint", sys.argv[1], "--out", sys.argv[5], "--sharded", "--batch-size"]
try:
    cli.main([*embed, "12"])
except SystemExit as stop:
    assert stop.code == 2
cli.main([*embed, "16"])
"""


def pictures(n=37):
    rng = np.random.default_rng(3)
    return np.stack([rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6)) for _ in range(n)])


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    scores = icar_jax.load(complexity_folder, batch_size=8).score(list(pictures()))
    thresholds = thresholds_for_shares(scores, (0.3, 0.3, 0.4))
    return make_bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("b") / "bundle", thresholds=thresholds)


@pytest.mark.check
@pytest.mark.parametrize("kind", ["bundle", "shared_bundle", "merged_bundle"])
def test_eight_devices_equal_one(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    np.save(tmp_path / "in.npy", pictures())
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02}.png")
    places = [str(tmp_path / name) for name in ("in.npy", "out.npz", "pictures", "corpus")]
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(path), *places],
        cwd=ROOT, env=environment(tmp_path / "cache", devices=8), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "a batch of 12 images cannot be sharded over 8 devices" in run.stderr
    found = np.load(tmp_path / "out.npz")
    one = icar_jax.load(path, batch_size=16, mesh=make_mesh(MeshConfig()))  # mesh of one device
    for n in (1, 16, 37):
        routed = one.route(list(pictures()[:n]))
        assert found[f"exits_{n}"].tolist() == routed.exits.tolist()
        np.testing.assert_allclose(found[f"embeddings_{n}"], routed.embeddings, atol=1e-5)
        np.testing.assert_allclose(found[f"scores_{n}"], routed.scores, atol=1e-5)
    corpus = open_corpus(tmp_path / "corpus")
    assert corpus.rows()["exit"].to_pylist() == found["exits_37"].tolist()
    np.testing.assert_allclose(corpus[:], found["embeddings_37"], atol=1e-3)
    assert set(found["exits_37"].tolist()) == set(one.exits)
    np.testing.assert_allclose(found["text"], one.encode_text(["a small red circle", "stripes"]), atol=1e-5)
