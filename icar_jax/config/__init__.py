"""Typed configuration of an experiment, and the checks that run before anything else.

A file in configs/ returns an `ExperimentConfig`; `--config.optim.lr=1e-4` overrides single fields afterwards. Because
overrides happen after construction, the checks live in `validate`, which names the field, the value and the fix.
"""

from icar_jax.config.addresses import HUB_FORMS, HubName, hub_name, not_local, require_local, require_weights
from icar_jax.config.checks import validate, validate_batch, validate_depth
from icar_jax.config.errors import unknown
from icar_jax.config.overrides import check_override, from_dict, to_json
from icar_jax.config.schema import (
    ClipConfig,
    ComplexityConfig,
    DataConfig,
    DistractorConfig,
    EvalConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from icar_jax.errors import ConfigError

__all__ = [
    "HUB_FORMS",
    "ClipConfig",
    "ComplexityConfig",
    "ConfigError",
    "DataConfig",
    "DistractorConfig",
    "EvalConfig",
    "ExperimentConfig",
    "HubName",
    "LossConfig",
    "MeshConfig",
    "OptimConfig",
    "TrainConfig",
    "check_override",
    "from_dict",
    "hub_name",
    "not_local",
    "require_local",
    "require_weights",
    "to_json",
    "unknown",
    "validate",
    "validate_batch",
    "validate_depth",
]
