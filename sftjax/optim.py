"""Optimizers and learning-rate schedules: optax chains that follow torch and transformers step for step.

The optimizer sees the trainable tree only (`{"params": ..., "adapter": ...}`); which parameters decay is one regex over
its paths. Layers are stacked in the tree, `[repeat, ...]` or `[repeat, expert, ...]`: optimizers that look at a
parameter's shape (Adafactor, Muon) are vmapped over those axes, so that a layer is treated as it would be alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sftjax import optim8bit, tree
from sftjax.errors import ConfigError

Schedule = Callable[[Any], Any]

# As transformers' Trainer: everything decays but biases and norms.
DECAY_REGEX = r"(?!(.*/)?bias$)(?!(.*_)?norm/)(?!.*[/_]norm/).*"

# Names that users of other tools know -> ours.
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
    "adamw_bf16": "adamw_bf16",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion_32bit": "lion",
    "muon": "muon",
    "sgd": "sgd",
}


def make_optimizer(
    *,
    name: str = "adamw",
    learning_rate: float,
    total_steps: int,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.1,
    weight_decay: float = 0.0,
    weight_decay_regex: str = DECAY_REGEX,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    loraplus_lr_ratio: float = 1.0,
    last_axis_shards: int = 1,
    seed: int = 0,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer and its schedule.

    Order of an update: clip by the global norm, moments, weight decay (decoupled), learning rate. Moments are float32
    whatever the parameters' dtype, but where the name says otherwise. Updates come out in float32: add them with
    `apply_updates`.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: at the peak.
      total_steps: optimizer steps of the whole run.
      schedule, warmup_steps, warmup_ratio, min_lr_ratio, decay_ratio: see `make_schedule`.
      weight_decay, weight_decay_regex: decay of the parameters whose whole path matches.
      b1, b2, eps: of Adam; Lion uses b1 and b2, SGD b1 as its momentum; Muon's momentum is 0.95.
      max_grad_norm: 0 doesn't clip.
      loraplus_lr_ratio: LoRA+ (arXiv:2402.12354): how much faster B learns than A.
      last_axis_shards: over how many devices a last axis may be split; 8-bit blocks stay within a shard.
      seed: of stochastic rounding.

    Raises:
      ConfigError: an unknown name or schedule, or warm-up longer than the run.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"train.optim={name!r}: use one of {', '.join(sorted(OPTIMIZERS))}")
    schedule_fn = make_schedule(
        schedule,
        learning_rate,
        total_steps,
        warmup_steps=warmup_steps,
        warmup_ratio=warmup_ratio,
        min_lr_ratio=min_lr_ratio,
        decay_ratio=decay_ratio,
    )
    core = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32),
        "adamw_8bit": lambda: optim8bit.scale_by_adam_8bit(b1, b2, eps, last_axis_shards=last_axis_shards),
        "adamw_bf16": lambda: optim8bit.scale_by_adam_bf16(b1, b2, eps, seed=seed),
        "adafactor": lambda: per_layer(_scale_by_adafactor()),
        "lion": lambda: optax.scale_by_lion(b1, b2, mu_dtype=jnp.float32),
        "muon": lambda: _scale_by_muon(b1, b2, eps),
        "sgd": lambda: optax.trace(b1) if b1 else optax.identity(),
    }[OPTIMIZERS[name]]()
    steps = [_to_float32()]
    if max_grad_norm:
        steps.append(clip_by_global_norm(max_grad_norm))
    steps.append(core)
    if weight_decay:
        steps.append(_add_decayed_weights(weight_decay, weight_decay_regex))
    if loraplus_lr_ratio != 1:
        steps.append(_scale_paths(r"(.*/)?lora_B", loraplus_lr_ratio))
    steps.append(optax.scale_by_learning_rate(schedule_fn))
    return optax.chain(*steps), schedule_fn


def make_schedule(
    kind: str,
    learning_rate: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> Schedule:
    """Learning rate of update number `step`, from 0, by transformers' formulas.

    Warm-up is linear from 0, so the first of several warm-up updates has learning rate 0, as in transformers.

    Args:
      kind: "constant" (after warm-up), "linear", "cosine", or "wsd" (warm-up, stable, then cosine decay over the last
        `decay_ratio` of the steps).
      warmup_steps: if 0, `warmup_ratio` of the steps, rounded up.
      min_lr_ratio: where linear, cosine and WSD end, as a part of `learning_rate`.
    """
    kind = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine"}.get(
        kind, kind
    )
    if kind not in ("constant", "linear", "cosine", "wsd"):
        raise ConfigError(f"train.lr_scheduler_type={kind!r}: use constant, linear, cosine or wsd")
    warmup = warmup_steps or math.ceil(total_steps * warmup_ratio)
    if warmup > total_steps:
        raise ConfigError(f"train.warmup_steps={warmup} is more than the run's {total_steps} steps")
    decay = math.ceil(total_steps * decay_ratio) if kind == "wsd" else total_steps - warmup
    decay_from = total_steps - decay

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - decay_from) / max(1, decay), 0.0, 1.0)
        if kind == "constant":
            factor = jnp.ones_like(step)
        elif kind == "linear":
            factor = 1.0 - progress
        else:
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        if kind != "constant":
            factor = factor * (1.0 - min_lr_ratio) + min_lr_ratio
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's `clip_grad_norm_`: multiplies by min(1, max_norm / (norm + 1e-6))."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apply_updates(params: tree.Tree, updates: tree.Tree, *, rounding_rng: jax.Array | None = None) -> tree.Tree:
    """`params + updates`, added in float32 and rounded to the parameters' dtype.

    Args:
      rounding_rng: with a key, bfloat16 parameters are rounded stochastically: updates smaller than half a unit in the
        last place would otherwise be lost for good.
    """

    def add(path, param, update):
        total = param.astype(jnp.float32) + update.astype(jnp.float32)
        if rounding_rng is None or param.dtype != jnp.bfloat16:
            return total.astype(param.dtype)
        return optim8bit.round_stochastically(optim8bit.path_key(rounding_rng, path), total)

    flat = tree.flatten(updates)
    return tree.map_paths(lambda path, param: add(path, param, flat[path]), params)


def leading_axes(path: str) -> int:
    """How many axes of a parameter count layers (and experts): 0, 1 or 2."""
    if not re.search(r"(^|/)layers_\d+/", path):
        return 0
    return 2 if "/experts/" in path else 1


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to every layer (and expert) by itself.

    Parameters with equal leading sizes form a group, over which `inner` is vmapped; the state is one inner state for
    each group, `{"16": ..., "": ...}`, stacked likewise.
    """

    def group_of(path, leaf):
        return "x".join(str(size) for size in leaf.shape[: leading_axes(path)])

    def split(trees):
        """`{group: [flat tree, ...]}`; the first tree decides."""
        groups: dict[str, list[dict[str, Any]]] = {}
        flats = [None if t is None else tree.flatten(t) for t in trees]
        for path, leaf in flats[0].items():
            parts = groups.setdefault(group_of(path, leaf), [{} if f is not None else None for f in flats])
            for part, flat in zip(parts, flats, strict=True):
                if part is not None:
                    part[path] = flat[path]
        return groups

    def mapped(function, group):
        for _ in group.split("x") if group else ():
            function = jax.vmap(function)
        return function

    def init(params):
        return {group: mapped(inner.init, group)(flat) for group, (flat,) in split([params]).items()}

    def update(updates, state, params=None):
        new_flat, new_state = {}, {}
        for group, (flat, flat_params) in split([updates, params]).items():
            function = mapped(lambda u, s, p: inner.update(u, s, p), group)
            changed, new_state[group] = function(flat, state[group], flat_params)
            new_flat.update(changed)
        return tree.map_paths(lambda path, _: new_flat[path], updates), new_state

    return optax.GradientTransformation(init, update)


def _to_float32() -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype(jnp.float32), updates))


def _add_decayed_weights(weight_decay: float, regex: str) -> optax.GradientTransformation:
    def update(updates, params):
        flat = tree.flatten(params)
        return tree.map_paths(
            lambda path, u: u + weight_decay * flat[path].astype(u.dtype) if re.fullmatch(regex, path) else u, updates
        )

    return optax.stateless(update)


def _scale_paths(regex: str, factor: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: tree.map_paths(lambda path, u: u * factor if re.fullmatch(regex, path) else u, updates)
    )


def _scale_by_adafactor() -> optax.GradientTransformation:
    """Factored second moments, update clipped to RMS 1, no momentum (arXiv:1804.04235); the learning rate is ours."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _scale_by_muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon on the matrices of blocks; AdamW on embeddings, head, norms and biases.

    Orthogonal updates are scaled to AdamW's usual size, 0.2 sqrt(max(out, in)) (arXiv:2502.16982), so that one
    learning rate serves both.
    """
    muon = per_layer(_muon_matrix(eps))
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)
    return _by_path(lambda path, leaf: leaf.ndim - leading_axes(path) == 2 and leading_axes(path) > 0, muon, adam)


def _muon_matrix(eps: float) -> optax.GradientTransformation:
    def rescale(updates, _):
        return jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)

    def matrices(updates):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0), updates)

    return optax.chain(
        contrib.scale_by_muon(beta=0.95, eps=eps, weight_dimension_numbers=matrices), optax.stateless(rescale)
    )


class _ByPathState(NamedTuple):
    chosen: Any
    rest: Any


def _by_path(choose, chosen_tx, rest_tx) -> optax.GradientTransformation:
    """`chosen_tx` on leaves that `choose(path, leaf)` picks, `rest_tx` on the others."""

    def split(t):
        flat = tree.flatten(t)
        picked = {path for path, leaf in flat.items() if choose(path, leaf)}
        return (
            tree.unflatten({path: leaf for path, leaf in flat.items() if path in picked}),
            tree.unflatten({path: leaf for path, leaf in flat.items() if path not in picked}),
        )

    def init(params):
        chosen, rest = split(params)
        return _ByPathState(chosen_tx.init(chosen), rest_tx.init(rest))

    def update(updates, state, params=None):
        (chosen, rest), (chosen_params, rest_params) = split(updates), split(params)
        chosen, chosen_state = chosen_tx.update(chosen, state.chosen, chosen_params)
        rest, rest_state = rest_tx.update(rest, state.rest, rest_params)
        flat = tree.flatten(tree.merge(chosen, rest))
        return tree.map_paths(lambda path, _: flat[path], updates), _ByPathState(chosen_state, rest_state)

    return optax.GradientTransformation(init, update)
