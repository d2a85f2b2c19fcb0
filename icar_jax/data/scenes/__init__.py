"""The built-in synthetic data set ``scenes``: compositional images rendered on demand, with captions and complexity."""

from icar_jax.data.scenes.dataset import SPLITS, Scenes
from icar_jax.data.scenes.drawn import DrawnScenes
from icar_jax.data.scenes.grammar import HELDOUT_PAIRS, Scene
from icar_jax.data.scenes.pictures import contact_sheet, picture_folder

__all__ = ["HELDOUT_PAIRS", "SPLITS", "DrawnScenes", "Scene", "Scenes", "contact_sheet", "picture_folder"]
