"""What an evaluation reads beside the evaluated split is not required to be there."""

from icar_jax.config import DataConfig, ExperimentConfig
from icar_jax.data import configured
from icar_jax.evaluation import evaluate
from tests.support.image_folders import put_images, put_karpathy


def test_a_json_of_the_test_split_alone_has_no_colour_baseline(tmp_path):
    put_images(tmp_path, ["a.png", "b.png"])
    put_karpathy(tmp_path, [("a.png", "test", ["one"], {}), ("b.png", "test", ["two"], {})])
    config = ExperimentConfig(data=DataConfig(source="folder", root=str(tmp_path)))
    config.eval.split = "test"
    assert len(configured.eval_source(config.data, config.eval)) == 2
    notes = []
    assert evaluate._colour_baseline_source(config, notes) is None
    assert len(notes) == 1 and "no split 'train'; it has test (2 images)" in notes[0]
