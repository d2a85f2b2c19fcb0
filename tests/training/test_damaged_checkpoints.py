"""A damaged training checkpoint: the one before it is used with a warning, or one line names the folder to delete."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from icar_jax.training.checkpoints import DAMAGED, SaveError, StateStore
from icar_jax.workdir import CHECKPOINTS, last_checkpoint


def state(step):
    rng = np.random.default_rng(step)
    return {"params": {"w": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)}, "step": jnp.asarray(step, jnp.int32)}


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with StateStore(folder, 3) as store:
        for step in (2, 4):
            store.save(step, state(step))
    return folder


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, abstract=ABSTRACT):
    with StateStore(workdir, 3) as store:
        step, found = store.restore_newest(abstract)
        return step, None if found is None else np.asarray(found["params"]["w"])


def damage(folder, how):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no values":
        shutil.rmtree(folder / "default" / "d", ignore_errors=True)
        shutil.rmtree(folder / "default" / "ocdbt.process_0", ignore_errors=True)
    else:
        for file in files:
            data = file.read_bytes()
            file.write_bytes({"cut": data[: len(data) // 2], "zeros": bytes(len(data)), "noise": bytes(reversed(data))}[how])


def test_the_newest_is_read(workdir):
    step, found = restore(workdir)
    assert step == 4
    np.testing.assert_array_equal(found, state(4)["params"]["w"])
    assert not (workdir / DAMAGED).exists()


def test_nothing_was_saved(tmp_path):
    assert restore(tmp_path) == (0, None)


@pytest.mark.parametrize("how", ["empty folder", "no values", "cut", "zeros", "noise"])
def test_the_one_before_a_damaged_one_is_used(workdir, how, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    damage(workdir / CHECKPOINTS / "4", how)
    step, found = restore(workdir)
    assert step == 2
    np.testing.assert_array_equal(found, state(2)["params"]["w"])
    ours = [text for text in warned if "continues from step 2" in text]
    assert len(ours) == 1 and f"{workdir / CHECKPOINTS / '4'} is damaged" in ours[0]
    assert (workdir / DAMAGED / "4").is_dir() and last_checkpoint(workdir) == 2
    with StateStore(workdir, 3) as store:  # the step can be saved again
        store.restore_newest(ABSTRACT)
        store.save(4, state(4))
    np.testing.assert_array_equal(restore(workdir)[1], state(4)["params"]["w"])


def test_one_damaged_file_is_found_or_harmless(workdir, saved):
    """Whichever file of the newest is cut: the values of one of the two checkpoints are read, never others."""
    files = [file.relative_to(workdir) for file in sorted((workdir / CHECKPOINTS / "4").rglob("*")) if file.is_file()]
    for file in files:
        shutil.rmtree(workdir)
        shutil.copytree(saved, workdir)
        (workdir / file).write_bytes((workdir / file).read_bytes()[:-3])
        step, found = restore(workdir)
        np.testing.assert_array_equal(found, state(step)["params"]["w"], err_msg=str(file))


def test_if_none_can_be_read_one_line_names_the_folder(workdir):
    for step in ("2", "4"):
        damage(workdir / CHECKPOINTS / step, "zeros")
    with pytest.raises(SaveError, match=r"checkpoints/4 is damaged and cannot be read \(.*delete that folder") as error:
        restore(workdir)
    assert "\n" not in str(error.value)
    assert sorted(entry.name for entry in (workdir / CHECKPOINTS).iterdir()) == ["2", "4"]


def test_another_structure_is_no_damage(workdir):
    other = {**ABSTRACT, "more": ABSTRACT["step"]}
    with pytest.raises(SaveError, match="of step 4 in .* does not match the state of this run"):
        restore(workdir, other)
    assert not (workdir / DAMAGED).exists()
