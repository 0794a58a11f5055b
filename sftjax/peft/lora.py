"""LoRA and its relatives as arrays beside the frozen weights.

Shapes: `R` rank, `...` any batch axes. One module's leaves, inside the scan over layers:

    lora_A [R, in]   lora_B [out, R]   scale []      y = W x + scale * B (A x)
    magnitude [out]                                  DoRA: y = magnitude / |W + scale * B A|  *  (the above)
    initial_lora_A, initial_lora_B                   PiSSA: A and B as they were at step 0, never trained
    lora_bias [out]                                  y = ... + scale * lora_bias
    trainable_tokens [n, in], token_indices [n]      rows of the embedding or the head that replace its own

In the tree each has a leading `[repeat]` axis, on experts `[repeat, expert]` (but `scale`). Layers of smaller rank are
padded with zeros up to the largest: the gradient of padding is exactly zero, so it stays zero. The embedding and the
head have no leading axis. Both are `[V, D]`, so PEFT's lora_embedding_A is B transposed, and its lora_embedding_B is A
transposed; the embedding's magnitude is `[D]`, over whose columns DoRA takes the norms there.

PiSSA trains the principal part of W and freezes the rest, W - s·B₀A₀. Here W stays as it is and B₀A₀ is subtracted in
the forward pass: the same function and gradients, with a base that other runs, quantisation and export can share.

Sources: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948; PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.kernels import nf4
from sftjax.kernels.linear import linear
from sftjax.peft import adapters
from sftjax.peft.spec import AdapterSpec, Target, find_targets, saved_modules

Array = jax.Array
# not scale, initial_lora_A, initial_lora_B, token_indices
TRAINED = ("lora_A", "lora_B", "magnitude", "lora_bias", "trainable_tokens", "weight", "bias")
CONSTANTS = ("scale", "token_indices")


def apply(
    x: Array,
    y_base: Array,
    adapter: Mapping[str, Array],
    *,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    base_weight: Callable[[], Array] | None = None,
    matmul: Callable[[Array, Array], Array] = linear,
) -> Array:
    """Adds one module's adapter to its output.

    Args:
      x: `[..., in]`, what the module got.
      y_base: `[..., out]`, `W x` without the module's bias (DoRA must not scale the bias): add that afterwards.
      adapter: the module's leaves, without the repeat axis. Modules without "lora_A" return `y_base`.
      dropout_rate, dropout_rng: dropout of the adapter's input, off without a key. PEFT's DoRA drops the base's input
        too, which costs a second product with W; here the base path is left whole. The expectation is the same.
      base_weight: gives W `[out, in]`, asked for by DoRA only.
      matmul: `(x, weight) -> x weightᵀ`; experts pass their grouped product.

    Returns:
      `[..., out]` in `y_base`'s dtype.
    """
    if "lora_A" not in adapter:
        return y_base
    x = _dropped(x, dropout_rate, dropout_rng)
    low_A, low_B = signed_factors(adapter)
    low = matmul(x, low_A.astype(x.dtype)) * adapter["scale"].astype(x.dtype)
    delta = matmul(low, low_B.astype(x.dtype)).astype(y_base.dtype)
    if "lora_bias" in adapter:
        delta = delta + _as_row(adapter["lora_bias"] * adapter["scale"], delta)
    if "magnitude" not in adapter:
        return y_base + delta
    factor = _dora_factor(adapter, base_weight()).reshape((1,) * (y_base.ndim - 1) + (-1,))
    return (factor * (y_base + delta).astype(jnp.float32)).astype(y_base.dtype)


def look_up(tokens: Array, table: Array, adapter: Mapping[str, Array], dtype: jnp.dtype) -> Array:
    """Rows of an embedding as its adapter has them.

    Args:
      tokens: int `[...]`.
      table: `[V, D]`, rows taken in its own dtype, so that the gradient of a frequent token isn't summed in bfloat16.
      adapter: the embedding's leaves, maybe none.
      dtype: of the result `[..., D]`.
    """
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
    if "lora_A" in adapter:
        low_A, low_B = signed_factors(adapter)
        rows = jnp.take(low_B, tokens, axis=0, mode="clip").astype(dtype)
        x = x + linear(rows * adapter["scale"].astype(dtype), low_A.T.astype(dtype))
        if "magnitude" in adapter:
            x = x * _as_row(_dora_factor(adapter, table, axis=0), x)
    if "trainable_tokens" in adapter:
        among = tokens[..., None] == adapter["token_indices"].reshape((1,) * tokens.ndim + (-1,))
        own = jnp.take(adapter["trainable_tokens"], jnp.argmax(among, axis=-1), axis=0).astype(dtype)
        x = jnp.where(jnp.any(among, axis=-1)[..., None], own, x)
    return x


def extend(
    hidden: Array,
    weight: Array,
    adapter: Mapping[str, Array],
    *,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> tuple[Array, Array]:
    """The head with its adapter as one product: `hidden' [..., D'] · weight' [V, D']`, of whatever type they have.

        logits = x Wᵀ + s (x Aᵀ) Bᵀ + s b  =  [x, s x Aᵀ, s] [W, B, b]ᵀ

    So nothing that takes a hidden state and a head has to know of adapters, and B isn't rounded with W.
    """
    if "trainable_tokens" in adapter:
        rows = adapter["trainable_tokens"].astype(weight.dtype)
        weight = weight.at[adapter["token_indices"]].set(rows, unique_indices=True)
    if "lora_A" not in adapter:
        return hidden, weight
    low_A, low_B = signed_factors(adapter)
    scale = adapter["scale"].astype(hidden.dtype)
    inputs = _dropped(hidden, dropout_rate, dropout_rng)
    columns, features = [weight, low_B], [hidden, linear(inputs, low_A.astype(hidden.dtype)) * scale]
    if "lora_bias" in adapter:
        columns.append(adapter["lora_bias"][:, None])
        features.append(jnp.broadcast_to(scale, (*hidden.shape[:-1], 1)))
    if "magnitude" in adapter:
        factor = _dora_factor(adapter, weight)[:, None]
        columns = [factor * column for column in columns]
    kind = jnp.result_type(*columns)
    return jnp.concatenate(features, axis=-1), jnp.concatenate([column.astype(kind) for column in columns], axis=-1)


def _dropped(x: Array, rate: float, rng: Array | None) -> Array:
    if rng is None or rate <= 0:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _as_row(vector: Array, like: Array) -> Array:
    """A vector along the last axis of another array, in its dtype."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)


def delta_weight(adapter: Mapping[str, Array]) -> Array:
    """`scale * B A`, float32, `[..., out, in]` for leaves with any leading axes."""
    low_A, low_B = signed_factors(adapter)
    low_A, low_B = low_A.astype(jnp.float32), low_B.astype(jnp.float32)
    product = jnp.matmul(low_B, low_A, precision="highest")
    scale = adapter["scale"]
    return product * scale.reshape(scale.shape + (1,) * (product.ndim - scale.ndim))


def weight_norm(weight: Array, adapter: Mapping[str, Array], axis: int = -1) -> Array:
    """`|W + scale * B A|` over inputs, float32 `[out]`, without building the sum; with axis 0 over outputs, `[in]`.

    |W + sBA|² = |W|² + 2 s (W Aᵀ · B) + s² (B (A Aᵀ) · B), each a row sum: the largest array is `[out, R]`.
    """
    low_A, low_B = (part.astype(jnp.float32) for part in signed_factors(adapter))
    if axis == 0:
        weight, low_A, low_B = weight.T, low_B.T, low_A.T
    scale = adapter["scale"]
    squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=-1)
    exact = jax.lax.Precision.HIGHEST
    cross = jnp.einsum("oi,ri->or", weight, low_A, precision=exact, preferred_element_type=jnp.float32)
    gram = jnp.einsum("ri,si->rs", low_A, low_A, precision=exact)
    gram = jnp.einsum("or,rs->os", low_B, gram, precision=exact)
    total = squares + 2 * scale * jnp.sum(cross * low_B, axis=-1) + scale**2 * jnp.sum(gram * low_B, axis=-1)
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))


def init(rng: Array, params: tree.Tree, spec: AdapterSpec, *, quant: tree.Tree | None = None) -> dict:
    """The adapter tree, float32.

    Pure, so `jax.jit(..., out_shardings=...)` and `jax.eval_shape` work; plain LoRA reads shapes only.

    Args:
      rng: a key; each leaf's numbers depend on it and on the leaf's path alone.
      params: the model's parameters (or ShapeDtypeStructs).
      spec: what to add. Method "full" adds nothing.
      quant: the quantised leaves, if the base is quantised.

    Raises:
      ConfigError: a pattern matches nothing, or a method that a module can't have.
    """
    flat: dict[str, Array] = {}
    if spec.bottleneck:
        flat.update(adapters.init(rng, params, spec))
    elif spec.method == "lora":
        for path, target in find_targets(params, spec, quant).items():
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            weight = None
            if spec.use_dora or spec.pissa:
                weight = base_weight(path, params, quant)
            for name, leaf in _init_module(key, path, target, spec, weight).items():
                flat[f"{path}/{name}"] = leaf
    flat_params = tree.flatten(params)
    for path in _copied(params, spec, quant) if spec.method != "full" else ():
        flat[path] = jnp.asarray(flat_params[path], jnp.float32)
    for module, rows in spec.trainable_token_indices if spec.method != "full" else ():
        flat |= {f"{module}/{name}": leaf for name, leaf in _init_rows(module, rows, flat_params).items()}
    return tree.unflatten(flat)


def _init_rows(module: str, rows: tuple[int, ...], params: Mapping[str, Array]) -> dict[str, Array]:
    """The trained rows of the embedding or the head, as they are in the base."""
    weight = params.get(f"{module}/weight")
    if weight is None:
        raise ConfigError(f"peft.trainable_token_indices: no {module} in this model: its head is tied to the embedding")
    if max(rows) >= weight.shape[0]:
        raise ConfigError(
            f"peft.trainable_token_indices: {module} has {weight.shape[0]} rows, and row {max(rows)} is wanted"
        )
    indices = np.asarray(rows, np.int32)
    return {"token_indices": jnp.asarray(indices), "trainable_tokens": jnp.asarray(weight[indices], jnp.float32)}


def _copied(params: tree.Tree, spec: AdapterSpec, quant: tree.Tree | None) -> list[str]:
    """Paths of the parameters that are trained as a copy in the adapter: whole modules, and biases.

    The copy wins over the model's own, so the base stays as it is and the adapter alone holds what was learnt.
    """
    saved = saved_modules(params, spec)
    wanted = {f"{module}/{name}" for module in saved for name in ("weight", "bias")}
    biases = [path for path in tree.flatten(params) if path.rpartition("/")[2] == "bias"]
    if spec.bias == "all":
        wanted.update(biases)
    elif spec.bias == "lora_only":
        targets = find_targets(params, spec, quant)
        partial = [path for path, target in targets.items() if 0 in target.ranks and f"{path}/bias" in biases]
        if partial:
            raise ConfigError(f"peft.bias='lora_only' needs all layers targeted or none; {partial[0]} is in part")
        wanted.update(f"{path}/bias" for path in targets)
    return [path for path in tree.flatten(params) if path in wanted]


def base_weight(path: str, params: tree.Tree, quant: tree.Tree | None = None) -> Array:
    """A module's stacked weight `[..., out, in]`; float32 if it had to be dequantised."""
    flat = tree.flatten(params)
    if f"{path}/weight" in flat:
        return flat[f"{path}/weight"]
    node = quant
    for key in path.split("/"):
        node = node[key]
    return jax.lax.map(lambda leaves: nf4.dequantise(leaves), node)


def trainable_regex(spec: AdapterSpec) -> str:
    """A regex over "<collection>/<path>" of everything that is trained.

    Of the adapter that is all but the constants; of the parameters all (method "full"), or what `also_train` adds.
    """
    if spec.method == "full":
        return r"params/.*"
    adapter = rf"adapter/(?:.*/)?(?:{'|'.join(TRAINED)})"
    return f"{adapter}|(?:{spec.also_train})" if spec.also_train else adapter


def count_parameters(params: tree.Tree, spec: AdapterSpec, *, quant: tree.Tree | None = None) -> int:
    """Trained numbers that the adapter adds, zero padding of smaller ranks not counted."""
    adapter = jax.eval_shape(lambda p, q: init(jax.random.key(0), p, spec, quant=q), params, quant)
    flat = tree.flatten({"adapter": adapter})
    total = sum(int(np.prod(leaf.shape)) for path, leaf in flat.items() if re.fullmatch(trainable_regex(spec), path))
    if spec.method == "lora":
        low = sum(int(np.prod(leaf.shape)) for path, leaf in flat.items() if re.fullmatch(r".*/lora_[AB]", path))
        total += sum(target.parameters for target in find_targets(params, spec, quant).values()) - low
    return total


def signed_factors(adapter: Mapping[str, Array]) -> tuple[Array, Array]:
    """A and B of the whole change; PiSSA's has the step-0 product subtracted, as rank 2R: [A; A₀], [B, -B₀]."""
    low_A, low_B = adapter["lora_A"], adapter["lora_B"]
    if "initial_lora_A" not in adapter:
        return low_A, low_B
    low_A = jnp.concatenate([low_A, adapter["initial_lora_A"]], axis=-2)
    low_B = jnp.concatenate([low_B, -adapter["initial_lora_B"]], axis=-1)
    return low_A, low_B


def _dora_factor(adapter: Mapping[str, Array], weight: Array, axis: int = -1) -> Array:
    """magnitude / |W + s B A| `[out]`, the norm a constant to the gradient (section 4.3 of the paper)."""
    fixed = {name: jax.lax.stop_gradient(leaf) for name, leaf in adapter.items()}
    norm = weight_norm(jax.lax.stop_gradient(weight), fixed, axis)
    # a layer that isn't targeted has scale 0 and must not train its magnitude either
    return jnp.where(adapter["scale"] == 0, 1.0, adapter["magnitude"] / norm)


def _init_module(key: Array, path: str, target: Target, spec: AdapterSpec, weight) -> dict[str, Array]:
    *leading, outputs, inputs = target.shape
    if spec.use_dora and len(leading) > 1:
        raise ConfigError(f"DoRA on experts ({path}) isn't supported; exclude them in peft.exclude_modules")
    if spec.lora_bias and (len(leading) > 1 or path == "embed_tokens"):
        raise ConfigError(f"lora_bias on {path}: PEFT has none there; exclude it in peft.exclude_modules")
    if path == "embed_tokens" and spec.init not in ("default", "gaussian"):
        raise ConfigError(f"init {spec.init!r} on the embedding: PEFT has none there; use default or gaussian")
    if not target.stacked:  # the embedding or the head, as a stack of one
        stack = dataclasses.replace(target, names=("model.layers.",), shape=(1, *target.shape))
        found = _init_module(key, f"/{path}", stack, spec, None if weight is None else weight[None])
        found = {name: leaf[0] for name, leaf in found.items()}
        if path == "embed_tokens":
            found["lora_A"] = jax.random.normal(key, found["lora_A"].shape)
            if spec.use_dora:
                found["magnitude"] = jnp.linalg.norm(jnp.asarray(weight, jnp.float32), axis=0)
        return found
    rank = max(target.ranks)
    used = np.arange(rank) < np.asarray(target.ranks)[:, None]  # [repeat, R]
    used_A = jnp.asarray(used.reshape(len(used), *(1,) * (len(leading) - 1), rank, 1))
    scale = jnp.asarray(target.scales, jnp.float32)
    leaves: dict[str, Array] = {"scale": scale}
    if spec.pissa:
        low_A, low_B = _principal(weight, target, spec)
        # copies: the trained ones are donated to the step, the others must outlive it
        leaves |= {"lora_A": low_A, "lora_B": low_B}
        leaves |= {"initial_lora_A": jnp.copy(low_A), "initial_lora_B": jnp.copy(low_B)}
    elif spec.init == "orthogonal":
        leaves |= _orthogonal(key, target)
    else:
        shape = (*leading, rank, inputs)
        if spec.init == "gaussian":
            ranks = jnp.maximum(jnp.sum(used_A, axis=-2, keepdims=True), 1)
            low_A = jax.random.normal(key, shape) / ranks
        else:  # torch's kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(in)
            low_A = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(inputs)
        leaves["lora_A"] = jnp.where(used_A, low_A, 0.0).astype(jnp.float32)
        leaves["lora_B"] = jnp.zeros((*leading, outputs, rank), jnp.float32)
    if spec.lora_bias:
        leaves["lora_bias"] = jnp.zeros((*leading, outputs), jnp.float32)
    if spec.use_dora:
        leaves["magnitude"] = jax.lax.map(
            lambda w: jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=-1)), jnp.asarray(weight)
        )
    return leaves


def _orthogonal(key: Array, target: Target) -> dict[str, Array]:
    """A and B whose product is 0 at first, as their ranks are orthogonal to each other: odd ones for A, even for B."""
    *leading, outputs, inputs = target.shape
    rank = max(target.ranks)
    if any(one not in (0, rank) for one in target.ranks) or rank % 2:
        raise ConfigError(
            f"init 'orthogonal': {target.names[0]} needs one even rank in all its layers, not {target.ranks}"
        )
    keys = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (*leading, rank, rank)))[0]
    left = jax.random.normal(keys[1], (*leading, inputs, rank // 2))
    right = jax.random.normal(keys[2], (*leading, outputs, rank // 2))
    used = jnp.asarray(target.ranks, jnp.float32).reshape(-1, *(1,) * (len(leading) + 1)) > 0
    low_A = jnp.swapaxes(jnp.matmul(left, basis[..., 0::2, :], precision="highest"), -1, -2) / 10.0
    low_B = jnp.matmul(right, basis[..., 1::2, :], precision="highest") / 10.0
    return {"lora_A": jnp.where(used, low_A, 0.0), "lora_B": jnp.where(used, low_B, 0.0)}


def _principal(weight: Array, target: Target, spec: AdapterSpec) -> tuple[Array, Array]:
    """PiSSA: A = sqrt(S / s) Vᵀ, B = U sqrt(S / s) of the largest singular values, layer by layer."""
    rank = max(target.ranks)
    experts = target.shape[1:-2]

    def one_layer(inputs):
        matrix, used, scale = inputs  # [(E,) out, in], [R], []
        left, values, right = _svd(matrix.astype(jnp.float32), rank, spec.init)
        root = jnp.sqrt(values / jnp.where(scale == 0, 1.0, scale)) * jnp.broadcast_to(used, values.shape)
        return root[..., :, None] * right, left * root[..., None, :]

    if rank > min(target.shape[-2:]):
        raise ConfigError(f"PiSSA rank {rank} is larger than the smaller side of {target.names[0]} {target.shape[-2:]}")
    used = np.arange(rank) < np.asarray(target.ranks)[:, None]
    scale = np.asarray(target.scales, np.float32)
    low_A, low_B = jax.lax.map(one_layer, (jnp.asarray(weight), jnp.asarray(used, jnp.float32), jnp.asarray(scale)))
    assert low_A.shape[1:-2] == experts
    return low_A, low_B


def _svd(matrix: Array, rank: int, kind: str) -> tuple[Array, Array, Array]:
    """The `rank` largest singular triplets, `[..., out, R]`, `[..., R]`, `[..., R, in]`."""
    if kind == "pissa":
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        return left[..., :rank], values[..., :rank], right[..., :rank, :]
    # randomised subspace iteration (Halko, Martinsson, Tropp 2009, algorithm 4.4)
    multiply = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    transposed = jnp.swapaxes(matrix, -1, -2)
    probe = jax.random.normal(jax.random.key(0), (matrix.shape[-1], min(2 * rank, *matrix.shape[-2:])))
    basis = jnp.linalg.qr(multiply(matrix, probe))[0]
    for _ in range(int(kind.rpartition("_")[2])):
        basis = jnp.linalg.qr(multiply(transposed, basis))[0]
        basis = jnp.linalg.qr(multiply(matrix, basis))[0]
    left, values, right = jnp.linalg.svd(multiply(jnp.swapaxes(basis, -1, -2), matrix), full_matrices=False)
    return multiply(basis, left)[..., :rank], values[..., :rank], right[..., :rank, :]
