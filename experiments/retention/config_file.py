"""Config file that loads a configuration from JSON: --config=experiments/retention/config_file.py:RUN.json"""

import json
from pathlib import Path

from icar_jax.config import ExperimentConfig, from_dict


def get_config(path: str) -> ExperimentConfig:
    return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
