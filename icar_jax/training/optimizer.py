"""AdamW or Muon with parameter groups: towers, exit heads and temperatures have rates of their own; groups may be frozen.

Also the moving average of the weights.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from icar_jax import pytree
from icar_jax.config import ConfigError, OptimConfig
from icar_jax.config.rules import parse_rate

GROUPS: tuple[tuple[str, str], ...] = (
    (r"(^|/)(exit_)?logit_(scale|bias)(/|$)", "temperature"),
    (r"(^|/)exits/", "exit"),
    (r"", "backbone"),
)

MUON_BETA = 0.95

# Frozen is what a model is made of, rates are what is learnt alike: the image tower and the text tower share a rate.
FREEZE_GROUPS: tuple[tuple[str, str], ...] = (
    (GROUPS[0][0], "temperature"),
    (GROUPS[1][0], "exits"),
    (r"^text/", "text"),
    (r"^tower/", "tower"),  # of a complexity model: part of the CLIP that it routes
    (r"", "image"),
)


_GROUP_NAMES = frozenset(name for _, name in FREEZE_GROUPS)


def group(path: str) -> str:
    """The parameter group of a path: temperature, exit or backbone."""
    return _first(GROUPS, path)


def _first(groups: Sequence[tuple[str, str]], path: str) -> str:
    return next(name for pattern, name in groups if re.search(pattern, path))


def trainable(path: str, freeze: tuple[str, ...]) -> bool:
    """Whether a parameter learns while `freeze` does not: groups (image, text, exits, temperature) and regexes of paths.

    'image' is the vision tower with its own head (ln_post, proj), 'exits' are the heads of its early exits.
    """
    held = any(re.search(entry, path) for entry in freeze if entry not in _GROUP_NAMES)
    return not held and _first(FREEZE_GROUPS, path) not in freeze


def rate_share(path: str, rates: Sequence[str]) -> float:
    """What config.optim.rates multiplies the rate of a parameter by."""
    for pattern, share in map(parse_rate, rates):
        if re.search(pattern, path):
            return share
    return 1.0


def require_matches(freeze: tuple[str, ...], rates: Sequence[str], shapes: pytree.Tree) -> None:
    """Raises ConfigError for a regular expression that is found in no path, and where nothing is left to learn."""
    paths = list(pytree.flatten(shapes))
    groups = {_first(FREEZE_GROUPS, path) for path in paths}
    if idle := [entry for entry in freeze if entry in _GROUP_NAMES - groups]:
        raise ConfigError(f"config.train.freeze holds {idle[0]!r}, and this model has no such parameters; take it out")
    patterns = [("config.train.freeze", entry) for entry in freeze if entry not in _GROUP_NAMES]
    patterns += [("config.optim.rates", parse_rate(entry)[0]) for entry in rates]
    for field, pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, [*_GROUP_NAMES, *paths], 3, 0.3)
            raise ConfigError(
                f"{field} holds {pattern!r}, which is found in no path of the {len(paths)} parameters; near it: "
                f"{', '.join(near) or 'nothing'}"
            )
    if not any(trainable(path, freeze) for path in paths):
        raise ConfigError(f"config.train.freeze={freeze} leaves nothing to train; take one of its entries out")


def decays(path: str, ndim: int) -> bool:
    """Weight decay applies to matrices, convolutions and the token embedding; not to norms, biases, positions, temperatures."""
    return ndim >= 2 and not path.endswith("/pos")


def orthogonalised(path: str, ndim: int) -> bool:
    """Whether Muon treats a parameter: matrices that multiply; not embeddings, positions, norms, biases or convolutions."""
    return ndim == 2 and path.endswith("/kernel")


def schedule(config: OptimConfig, steps: int):
    """Share of the peak rate at a step: linear warm-up from 0, then a cosine down to `final_lr` at the last step."""
    warmup = min(config.warmup_steps, steps)

    def share(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        falling = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return share


def make_optimizer(config: OptimConfig, steps: int, freeze: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon, decoupled decay, then the group's rate along the schedule.

    Frozen leaves (see `trainable`) are not changed, have no moments, and do not count in the norm that is clipped. The state
    has the same structure whatever the rates, decay and clipping, so that a run may be continued with others.
    """
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _muon(config) if config.kind == "muon" else _adam(config),
        optax.add_decayed_weights(
            config.weight_decay,
            # A leaf that is masked out because it is frozen has no dimensions.
            mask=lambda params: pytree.map_with_path(lambda path, leaf: decays(path, getattr(leaf, "ndim", 0)), params),
        ),
        _scale_by_group(config, steps),
    ]
    learn = optax.chain(*parts)
    if not freeze:
        return learn

    def labels(params: pytree.Tree) -> pytree.Tree:
        return pytree.map_with_path(lambda path, _: "learn" if trainable(path, freeze) else "frozen", params)

    return optax.partition({"learn": learn, "frozen": _stay()}, labels)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.mu_dtype))


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Momentum made orthogonal by Newton-Schulz steps for matrices, Adam for everything else.

    Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them the root mean square that Adam's have (Liu et al.,
    arXiv 2502.16982), so that rates and decay mean the same as for AdamW.
    """
    one_matrix = lambda tree: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)
    like_adam = optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates))
    matrices = contrib.scale_by_muon(
        # Rescaled so that four steps do what five do of matrices scaled by their norm alone (Boissin et al., arXiv 2512.04632).
        ns_steps=4,
        preconditioning="aol",
        beta=MUON_BETA,
        mu_dtype=jnp.dtype(config.mu_dtype),
        weight_dimension_numbers=one_matrix,
    )

    def labels(params: pytree.Tree) -> pytree.Tree:
        return pytree.map_with_path(
            lambda path, leaf: "matrix" if orthogonalised(path, getattr(leaf, "ndim", 0)) else "other", params
        )

    return optax.partition({"matrix": optax.chain(matrices, like_adam), "other": _adam(config)}, labels)


def _stay() -> optax.GradientTransformation:
    """Updates that change no bit: x + -0.0 is x for every x, where 0.0 would turn -0.0 into 0.0."""
    still = lambda updates, state, params=None: (jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates), state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), still)


def _scale_by_group(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    groups = {"backbone": config.lr, "exit": config.exit_lr, "temperature": config.temperature_lr}
    share = schedule(config, steps)

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None):
        now = share(state.count)
        rate = lambda path: groups[group(path)] * rate_share(path, config.rates)
        scaled = pytree.map_with_path(lambda path, u: u if isinstance(u, optax.MaskedNode) else -rate(path) * now * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def state_like(optimizer: optax.GradientTransformation, shapes: pytree.Tree, of_params: pytree.Tree, other: Any) -> Any:
    """The optimizer's state with each moment replaced by its parameter's entry of `of_params`, anything else by `other`.

    `shapes` are those of the parameters. A moment is what lies at the path of a parameter and has its shape; frozen parameters
    have none.
    """
    entries, parameters = pytree.flatten(of_params), pytree.flatten(shapes)

    def entry(keys: tuple[Any, ...], leaf: Any) -> Any:
        named = [isinstance(key, jax.tree_util.DictKey) for key in keys]
        path = "/".join(str(key.key) for key in keys[len(keys) - named[::-1].index(False) if False in named else 0 :])
        return entries[path] if path in parameters and parameters[path].shape == leaf.shape else other

    return jax.tree_util.tree_map_with_path(entry, jax.eval_shape(optimizer.init, shapes))


def ema_init(params: pytree.Tree) -> pytree.Tree:
    """The moving average before the first step: a float32 copy of the parameters, in buffers of its own."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema: pytree.Tree, params: pytree.Tree, decay: float, step: jax.Array | int) -> pytree.Tree:
    """The moving average after an update, e + (1 - d) (p - e), in float32.

    d = min(decay, (1 + step) / (10 + step)), where `step` counts the updates before this one: a fixed decay would hold on to
    the first weights for some 1 / (1 - decay) steps.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - keep) * (p.astype(jnp.float32) - e), ema, params)
