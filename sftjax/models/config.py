"""What a decoder-only language model is made of: one frozen record whose fields vary by family.

No code here or in the other modules of `models` asks which family it is; `weights/families.py` reads a Hugging
Face `config.json` into these fields, and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length.

    Names and formulas as in transformers' `modeling_rope_utils`. Fields that a kind doesn't use keep their defaults.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0  # longrope: max_position / original_max_position, if the config has none
    original_max_position: int = 0  # 0: the model's max_position
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # longrope: one factor for each rotated pair
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    # yarn, longrope: multiplies cos and sin; None: by the kind's formula
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer type."""

    theta: float
    dim: int  # rotated dimensions of a head, the first `dim` of `head_dim`
    scaling: RopeScaling | None = None
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of halves (Cohere)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture-of-experts MLP."""

    count: int
    per_token: int
    intermediate_size: int
    normalize_top_k: bool  # chosen probabilities are made to sum to 1
    softmax_after_top_k: bool = False  # GPT-OSS: softmax over the chosen logits only
    shared_intermediate_size: int = 0  # Qwen2-MoE: a dense expert with a sigmoid gate beside the routed ones
    router_bias: bool = False
    bias: bool = False  # experts' projections have biases
    aux_loss_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer. Layers with equal specs are scanned together."""

    window: int | None = None  # sliding attention: how many positions, the own one included; None: all before
    rope: Rope | None = None  # None: no position embedding (NoPE)
    experts: Experts | None = None  # None: a dense MLP


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    `layers` has one entry per layer; `layer_plan(config.layers)` groups them for scanning.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    tie_word_embeddings: bool
    activation: Literal["silu", "gelu", "gelu_tanh", "swiglu_oai"] = "silu"
    # norms
    norm_kind: Literal["rms", "layer"] = "rms"  # "layer": mean-centred, scale without bias (Cohere)
    norm_plus_one: bool = False  # Gemma: the stored weight is an offset from 1
    pre_norm: bool = True  # norms before attention and MLP
    post_norm: bool = False  # norms after them, before the residual sum (Gemma 2, OLMo 2)
    parallel_block: bool = False  # attention and MLP read the same normed input (Cohere)
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head (Qwen3, Gemma 3) or all heads at once (OLMo 2)
    # biases
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # scales and caps
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    attention_sinks: bool = False  # GPT-OSS: a learned logit per head joins the softmax
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # multiplies the logits
    swiglu_limit: float | None = None  # GPT-OSS clamps gate and up
    # rows of the embedding from here on only pad it (for sharding): they never win the softmax
    valid_vocab: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary embeddings, in order of appearance; each needs one pair of tables."""
        return tuple(dict.fromkeys(spec.rope for spec in self.layers if spec.rope is not None))

    @property
    def experts(self) -> Experts | None:
        """The experts of the layers that have some (the same in all of them)."""
        return next((spec.experts for spec in self.layers if spec.experts is not None), None)

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)


def layer_plan(layers: Sequence[LayerSpec]) -> list[tuple[tuple[LayerSpec, ...], int]]:
    """Groups layers into runs of a repeated unit: `[(unit, repeats), ...]`.

    Each run becomes one `scan`. A uniform model is one run; Gemma-3-1B's 26 layers (five local, one global, ...)
    are `[(LLLLLG, 4), (L, 2)]`. The shortest description wins: fewest layers to compile, then fewest runs.

        LLGLLGL  ->  [(LLG, 2), (L, 1)]
    """
    layers = tuple(layers)
    best: dict[int, tuple[tuple[int, int], list[tuple[tuple[LayerSpec, ...], int]]]] = {len(layers): ((0, 0), [])}
    longest_unit = max(1, min(len(layers), 16))
    for start in range(len(layers) - 1, -1, -1):
        options = []
        for size in range(min(longest_unit, len(layers) - start), 0, -1):
            unit = layers[start : start + size]
            repeats, end = 0, start
            while layers[end : end + size] == unit:
                repeats, end = repeats + 1, end + size
                (compiled, runs), tail = best[end]
                options.append(((compiled + size, runs + 1), [(unit, repeats), *tail]))
        best[start] = min(options, key=lambda option: option[0])
    return best[0][1]


def layer_address(layers: Sequence[LayerSpec], layer: int) -> tuple[int, int, int]:
    """Where layer number `layer` lives: (run, position in the unit, repeat).

    Its parameters are at `layers_<run>/<position>/...`, index `repeat` of the leading axis.
    """
    first = 0
    for run, (unit, repeats) in enumerate(layer_plan(layers)):
        if layer < first + len(unit) * repeats:
            repeat, position = divmod(layer - first, len(unit))
            return run, position, repeat
        first += len(unit) * repeats
    raise IndexError(f"layer {layer} of {len(layers)}")
