"""What PEFT can put a LoRA adapter on, under the names that transformers has, and which modules of the tree it holds.

A unit is a linear module, the embedding, or a parameter that holds all experts of a layer:

    model.layers.3.self_attn.q_proj                            one matrix, one piece
    model.layers.3.self_attn.qkv_proj                          one matrix, three pieces: rows of q, of k and of v
    model.layers.3.mlp.experts, parameter "gate_up_proj"       E matrices, two pieces each

Experts have two forms. As "modules", one by one, they are in checkpoints and in transformers 4; as "parameters", all in
one, in transformers 5. GPT-OSS has parameters in both.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from sftjax.models.config import ModelConfig, layer_address
from sftjax.weights import rules

FORMS = ("modules", "parameters")
_ADAPTABLE = re.compile(r"(?:.*/)?(?:\w+_proj|router|shared_expert_gate|embed_tokens|lm_head)/weight")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A module of the tree (or one layer and expert of it), and its rows in the unit's matrix."""

    path: str  # layers_0/0/self_attn/q_proj
    index: tuple[int, ...]
    name: str  # model.layers.3.self_attn.q_proj
    rows: slice
    size: int


@dataclasses.dataclass(frozen=True, eq=False)  # each is made once
class Unit:
    """See above. `matrices` has one tuple of pieces per expert, or a single one."""

    module: str
    parameter: str  # "" for a module
    shape: tuple[int, int]  # [out, in] of one matrix
    matrices: tuple[tuple[Piece, ...], ...]
    linear: bool = True  # whether transformers 5 has it as a linear module: its routers aren't

    @property
    def name(self) -> str:
        """What patterns of ranks are matched with."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    @property
    def embedding(self) -> bool:
        return self.module.endswith("embed_tokens")

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for matrix in self.matrices for piece in matrix)

    @property
    def is_router(self) -> bool:
        return self.matrices[0][0].path.endswith("/router")

    @property
    def is_expert(self) -> bool:
        return "/experts/" in self.matrices[0][0].path


def has_two_forms(config: ModelConfig, layout: str) -> bool:
    return config.experts is not None and layout != "gpt_oss"


@functools.lru_cache(maxsize=16)
def units(config: ModelConfig, layout: str, form: str = "modules") -> tuple[Unit, ...]:
    """All units of a model, in the order in which transformers registers them.

    Args:
      layout: of the family's checkpoints; see `rules.tensors`.
      form: of the experts: "modules" or "parameters".
    """
    if form == "parameters" and has_two_forms(config, layout):
        layout = "fused_experts"
    if layout == "mxfp4":
        layout = "gpt_oss"
    found = []
    for tensor in rules.tensors(config, layout):
        if not _ADAPTABLE.fullmatch(tensor.parts[0].path):
            continue
        linear = not (tensor.parts[0].path.endswith("/router/weight") and (form == "parameters" or layout == "gpt_oss"))
        matrices: dict[int, list[Piece]] = {}
        for part in tensor.parts:
            piece = _piece(config, part)
            matrices.setdefault(part.select[0] if len(tensor.shape) == 3 else 0, []).append(piece)
        if len(tensor.shape) == 3:
            module, _, parameter = tensor.name.rpartition(".")
            transposed = tensor.parts[0].transpose
            shape = tensor.shape[:0:-1] if transposed else tensor.shape[1:]
        else:
            module, parameter, shape = tensor.name.removesuffix(".weight"), "", tensor.shape
        found.append(Unit(module, parameter, shape, tuple(map(tuple, matrices.values())), linear))
    if config.tie_word_embeddings:  # PEFT can adapt the head alone all the same
        shape = (config.vocab_size, config.hidden_size)
        found.append(Unit("lm_head", "", shape, ((Piece("lm_head", (), "lm_head", slice(None), shape[0]),),)))
    return tuple(found)


def tensor_shapes(config: ModelConfig, layout: str, form: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors as transformers has them in memory."""
    if form == "parameters" and has_two_forms(config, layout):
        layout = "fused_experts"
    shapes = {tensor.name: tensor.shape for tensor in rules.tensors(config, layout)}
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _piece(config: ModelConfig, part: rules.Part) -> Piece:
    path = part.path.removesuffix("/weight")
    rows = part.select[-1] if part.select and isinstance(part.select[-1], slice) else slice(None)
    if not path.startswith("layers_"):
        name = path if path == "lm_head" else f"model.{path}"
        return Piece(path, part.index, name, rows, part.shape[0])
    run, position, *rest = path.split("/")
    layer = _layers(config)[f"{run}/{position}", part.index[0]]
    return Piece(path, part.index, f"model.layers.{layer}.{'.'.join(rest)}", rows, part.shape[0])


@functools.lru_cache(maxsize=16)
def _layers(config: ModelConfig) -> dict[tuple[str, int], int]:
    """{(run and position, repeat): number of the layer}."""
    addresses = [layer_address(config.layers, layer) for layer in range(config.num_layers)]
    return {(f"layers_{run}/{position}", repeat): layer for layer, (run, position, repeat) in enumerate(addresses)}
