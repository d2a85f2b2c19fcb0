"""AdamW or Muon with parameter groups, and the exponential moving average of the weights.

Towers, exit heads and temperatures have separate learning rates; groups can be frozen.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

# Groups for freezing follow the towers. Groups for learning rates do not: the image and text towers share one.
FREEZE_GROUPS: tuple[tuple[str, str], ...] = (
    (GROUPS[0][0], "temperature"),
    (GROUPS[1][0], "exits"),
    (r"^text/", "text"),
    (r"^tower/", "tower"),  # of a complexity model with variant 'blocks': the copied blocks of the CLIP
    (r"", "image"),
)


# Parts of a group: a tower without its heads, so that LiT's heads learn.
TRUNKS = {
    "image_trunk": r"^vision/(patch|cls|pos|registers|ln_pre|blocks)(/|$)",
    "text_trunk": r"^text/(embed|pos|ln_embed|blocks)(/|$)",
}
_GROUP_NAMES = frozenset({*(name for _, name in FREEZE_GROUPS), *TRUNKS})


def group(path: str) -> str:
    """Returns the learning-rate group of a parameter path: 'temperature', 'exit' or 'backbone'."""
    return _first(GROUPS, path)


def _first(groups: Sequence[tuple[str, str]], path: str) -> str:
    return next(name for pattern, name in groups if re.search(pattern, path))


def trainable(path: str, freeze: tuple[str, ...]) -> bool:
    """Returns whether the parameter at `path` is trained.

    `freeze` lists groups (image, text, exits, temperature, image_trunk, text_trunk) and regular expressions of paths. 'image'
    is the vision tower with its full-depth head (ln_post, proj), 'exits' are the heads of its early exits, and a trunk is a
    tower without heads.
    """
    patterns = [TRUNKS.get(entry, entry) for entry in freeze if entry in TRUNKS or entry not in _GROUP_NAMES]
    frozen = any(re.search(pattern, path) for pattern in patterns)
    return not frozen and _first(FREEZE_GROUPS, path) not in freeze


def rate_share(path: str, rates: Sequence[str]) -> float:
    """Returns the factor that `rates` (config.optim.rates) puts on the learning rate of a parameter; 1 if none matches."""
    for pattern, share in map(parse_rate, rates):
        if re.search(pattern, path):
            return share
    return 1.0


def require_matches(freeze: tuple[str, ...], rates: Sequence[str], shapes: pytree.Tree) -> None:
    """Raises ConfigError if a group or regular expression matches no parameter, or if every parameter is frozen."""
    paths = list(pytree.flatten(shapes))
    groups = {_first(FREEZE_GROUPS, path) for path in paths}
    groups |= {name for name, pattern in TRUNKS.items() if any(re.search(pattern, path) for path in paths)}
    if idle := [entry for entry in freeze if entry in _GROUP_NAMES - groups]:
        raise ConfigError(f"config.train.freeze contains {idle[0]!r}, but this model has no such parameters; remove it")
    patterns = [("config.train.freeze", entry) for entry in freeze if entry not in _GROUP_NAMES]
    patterns += [("config.optim.rates", parse_rate(entry)[0]) for entry in rates]
    for field, pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, [*_GROUP_NAMES, *paths], 3, 0.3)
            raise ConfigError(
                f"{field} contains {pattern!r}, which matches none of the {len(paths)} parameters; closest: "
                f"{', '.join(near) or 'none'}"
            )
    if not any(trainable(path, freeze) for path in paths):
        raise ConfigError(f"config.train.freeze={freeze} freezes every parameter; remove an entry")


def decays(path: str, ndim: int) -> bool:
    """Returns whether weight decay applies: to matrices, convolutions and the token embedding.

    Norms, biases, position embeddings and temperatures are not decayed.
    """
    return ndim >= 2 and not path.endswith("/pos")


def orthogonalised(path: str, ndim: int) -> bool:
    """Returns whether Muon updates a parameter: kernels of linear layers only.

    Embeddings, position embeddings, norms, biases and convolutions are updated by Adam.
    """
    return ndim == 2 and path.endswith("/kernel")


def schedule(config: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Returns a function from the step (starting at 0) to the fraction of the peak learning rate, float32.

    Linear warm-up to 1, then cosine decay to `final_lr` at the last step. Differs from optax's schedule, whose warm-up starts
    with a step at rate 0; runs that resume need the same values as before.
    """
    warmup = min(config.warmup_steps, steps)

    def share(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        falling = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return share


def make_optimizer(config: OptimConfig, steps: int, freeze: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, Adam or Muon, decoupled weight decay, scheduled rate of each group.

    Frozen parameters (see `trainable`) are not changed, have no moments and do not count in the clipped norm. The structure of
    the state does not depend on rates, decay or clipping, so a run can be resumed with other values.
    """
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _muon(config) if config.kind == "muon" else _adam(config),
        optax.add_decayed_weights(
            config.weight_decay,
            # Frozen leaves are masked out and have no ndim.
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
    """Muon (momentum orthogonalised by Newton-Schulz steps) for matrices, Adam for all other parameters.

    Updates are scaled by 0.2 sqrt(max(rows, columns)) to match the RMS of Adam's updates (Liu et al., arXiv:2502.16982), so
    learning rate and weight decay can be used as for AdamW.
    """
    one_matrix = lambda tree: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)
    like_adam = optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates))
    matrices = contrib.scale_by_muon(
        # With AOL preconditioning four steps do as well as five with scaling by the norm (Boissin et al., arXiv:2512.04632).
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
    """Updates of -0.0, which leave every bit unchanged; an update of 0.0 would turn -0.0 into 0.0."""
    still = lambda updates, state, params=None: (jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates), state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), still)


_BLOCK = re.compile(r"^(vision|text)/blocks/(\d+)/")
_BELOW_BLOCKS = re.compile(r"^(vision|text)/(patch|cls|pos|registers|ln_pre|embed|ln_embed)(/|$)")


def layer_share(path: str, depths: Mapping[str, int], decay: float) -> float:
    """Returns the factor of layer-wise decay on the learning rate of a parameter.

    It is decay^(depth - i) for block i (from 0) of a tower, decay^(depth + 1) for what lies below the blocks, and 1 for heads.

    Args:
        depths: {'vision', 'text': number of blocks}.
        decay: config.optim.layer_decay.
    """
    if found := _BLOCK.match(path):
        return decay ** (depths[found[1]] - int(found[2]))
    if found := _BELOW_BLOCKS.match(path):
        return decay ** (depths.get(found[1], 0) + 1)
    return 1.0


def _depths(paths: Iterable[str]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for found in filter(None, map(_BLOCK.match, paths)):
        depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def _scale_by_group(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    groups = {"backbone": config.lr, "exit": config.exit_lr, "temperature": config.temperature_lr}
    share = schedule(config, steps)

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None):
        now, depths = share(state.count), _depths(pytree.flatten(updates))
        rate = lambda path: groups[group(path)] * rate_share(path, config.rates) * layer_share(path, depths, config.layer_decay)
        scaled = pytree.map_with_path(lambda path, u: u if isinstance(u, optax.MaskedNode) else -rate(path) * now * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def state_like(optimizer: optax.GradientTransformation, shapes: pytree.Tree, of_params: pytree.Tree, other: Any) -> Any:
    """Returns the optimizer's state with each moment replaced by its parameter's entry of `of_params`, other leaves by `other`.

    `shapes` are the shapes of the parameters. A leaf is a moment if its path ends in the path of a parameter of the same shape;
    frozen parameters have no moments.
    """
    entries, parameters = pytree.flatten(of_params), pytree.flatten(shapes)

    def entry(keys: tuple[Any, ...], leaf: Any) -> Any:
        named = [isinstance(key, jax.tree_util.DictKey) for key in keys]
        path = "/".join(str(key.key) for key in keys[len(keys) - named[::-1].index(False) if False in named else 0 :])
        return entries[path] if path in parameters and parameters[path].shape == leaf.shape else other

    return jax.tree_util.tree_map_with_path(entry, jax.eval_shape(optimizer.init, shapes))


def ema_init(params: pytree.Tree) -> pytree.Tree:
    """Returns the moving average before the first step: a float32 copy of the parameters in new buffers."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema: pytree.Tree, params: pytree.Tree, decay: float, step: jax.Array | int) -> pytree.Tree:
    """Returns the moving average after an update, e + (1 - d) (p - e), in float32.

    d = min(decay, (1 + step) / (10 + step)), where `step` counts the updates before this one. A fixed decay would keep the
    initial weights in the average for about 1 / (1 - decay) steps.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - keep) * (p.astype(jnp.float32) - e), ema, params)
