"""An adapter of ours as PEFT's tensors and settings: nothing is written here.

Stacked layers are taken apart, and zero padding of smaller ranks is cut off. A PiSSA adapter becomes the plain LoRA of
twice the rank that it amounts to, so it loads on the unchanged base. Where transformers fuses what the tree keeps apart
(Phi-3's qkv_proj, an expert's gate_up_proj), A matrices are stacked and B matrices laid out along a diagonal:

    q: A₁ [r, D], B₁    k: A₂ [r, D], B₂    v: none    ->    A = [A₁; A₂] [2r, D]    B = [B₁ 0; 0 B₂; 0 0]

exactly the same function, of a larger rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft.spec import AdapterSpec, all_names
from sftjax.weights import peft_rules, peft_settings, peft_units, rules
from sftjax.weights.peft_rules import PREFIX, Adapted
from sftjax.weights.peft_units import Piece, Unit

Flat = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Written:
    """An adapter folder's content."""

    form: str  # of the experts
    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Low:
    """The adapter of one matrix."""

    low_A: np.ndarray
    low_B: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.low_A.shape[0]


def export(
    adapter: tree.Tree, spec: AdapterSpec, config: ModelConfig, layout: str, base_model: str | None = None
) -> Written:
    """PEFT's files for an adapter.

    Raises:
      ConfigError: something that PEFT has no form for.
    """
    if config.valid_vocab is not None:  # rows that only pad the vocabulary stay here
        config = config.replace(vocab_size=config.valid_vocab, valid_vocab=None)
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(adapter).items()}
    written = _export(flat, spec, config, layout, "modules", base_model)
    if _fits_both(written, spec, config, layout):
        return written
    return _export(flat, spec, config, layout, "parameters", base_model)


def check(spec: AdapterSpec, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, layout: str) -> str:
    """Makes sure that PEFT has a form for an adapter of these leaves, before it is trained.

    Returns:
      the form of its experts.

    Raises:
      ConfigError: naming the modules that PEFT would drop, and what helps.
    """
    # no leaf is like another, as after training; each is one number
    leaves = {
        path: np.broadcast_to(np.float32(number + 1), shape) for number, (path, shape) in enumerate(shapes.items())
    }
    for path, shape in shapes.items():
        if path.endswith("/token_indices"):
            leaves[path] = np.asarray(spec.token_rows(path.partition("/")[0]), np.int32).reshape(shape)
        elif path.endswith("/scale"):
            leaves[path] = np.zeros(shape, np.float32)
    for piece in (piece for unit in peft_units.units(config, layout) for piece in unit.pieces):
        if spec.targets(piece.name) and f"{piece.path}/scale" in leaves:
            leaves[f"{piece.path}/scale"][piece.index[:1]] = 1.0
    written = export(tree.unflatten(leaves), spec, config, layout)
    verify(written.settings, {name: value.shape for name, value in written.tensors.items()}, config, layout)
    return written.form


def verify(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, layout: str
) -> list[str]:
    """Holds a folder against PEFT's contract: what it says, for each major version of transformers that reads it.

    Returns:
      the versions under which PEFT loads it whole, "5" among them.

    Raises:
      ConfigError: PEFT under transformers 5 would drop, miss or refuse something, module by module.
    """
    if config.valid_vocab is not None:
        config = config.replace(vocab_size=config.valid_vocab, valid_vocab=None)
    spec = peft_settings.read(settings, "adapter_config.json")
    names = list(shapes)
    experts = any(".experts." in name and ".lora_" in name for name in names)
    as_modules = experts and not spec.target_parameters
    found = {}
    for version, form in (("4", "modules"), ("5", "parameters")):
        units = peft_units.units(config, layout, form)
        tensors = peft_units.tensor_shapes(config, layout, form)
        held, sizes = spec, dict(shapes)
        if version == "5" and as_modules and peft_rules.converts_experts(config, layout):
            held, sizes = peft_rules.in_transformers_5(spec, sizes, config, layout)
        found[version] = peft_rules.problems(held, sizes, units, tensors)
    if layout == "gpt_oss" and experts:  # PEFT there mistakes which axis of the experts' parameters is the input
        found["4"] = ["the experts' parameters"]
    if found["5"]:
        shown = "; ".join(found["5"][:8]) + (f"; and {len(found['5']) - 8} more" if len(found["5"]) > 8 else "")
        raise ConfigError(f"the adapter isn't what PEFT looks for on this model: {shown}")
    return [version for version, problems in found.items() if not problems]


def _fits_both(written: Written, spec: AdapterSpec, config: ModelConfig, layout: str) -> bool:
    """Whether experts as modules come out right under transformers 5 too, where PEFT converts them."""
    if not peft_units.has_two_forms(config, layout):
        return True
    units = peft_units.units(config, layout, "modules")
    plain = peft_settings.read(written.settings, "")
    found = peft_rules.adapted(plain, units)
    experts = [one for one in found if one.unit.is_expert]
    others = [one for one in found if not one.unit.is_expert]
    if any(
        one.unit.is_router or peft_rules.takes_for_experts(config, layout, one.unit.module) for one in others
    ):  # transformers 5 has them as parameters, or PEFT takes them for such
        return False
    if any(".experts." in name and ".lora_" not in name for name in written.tensors):
        return False  # experts trained in full
    if not experts:
        return True
    if not peft_rules.converts_experts(config, layout):
        return False
    alike = {(one.rank, float(f"{one.scale:.6g}")) for one in experts}
    whole = len(experts) == sum(unit.is_expert for unit in units)
    return whole and len(alike) == 1 and experts[0].rank == plain.rank


# --------------------------------------------------------------------------------------------------------- low ranks


def _export(
    flat: Flat, spec: AdapterSpec, config: ModelConfig, layout: str, form: str, base_model: str | None
) -> Written:
    units = peft_units.units(config, layout, form)
    found = {unit: low for unit in units if (low := _unit(unit, flat, spec)) is not None}
    prefixes = peft_rules.wrapped(found)
    parameters = {unit.name for unit in units if peft_rules.as_parameter(unit, form, config, layout)}
    exported, tensors = [], {}
    for unit, lows in found.items():
        key = peft_rules.parameter_name(unit) if unit.name in parameters else unit.module
        one = Adapted(unit, key, lows[0].rank, lows[0].scale, prefixes[unit.name])
        exported.append(one)
        tensors |= _tensors(one, lows, spec)
    copied, saved = _copies(flat, spec, config, layout, form, exported)
    tensors |= copied
    rows = {}
    for module in ("embed_tokens", "lm_head"):
        if f"{module}/trainable_tokens" in flat:
            name = "model.embed_tokens" if module == "embed_tokens" else module
            tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = flat[f"{module}/trainable_tokens"]
            rows[module] = [int(row) for row in flat[f"{module}/token_indices"]]
    settings = peft_settings.write(
        spec,
        exported,
        units,
        parameters=parameters,
        saved=saved,
        rows=rows,
        ties=ties(flat, config),
        base_model=base_model,
    )
    return Written(form, settings, tensors)


def _tensors(one: Adapted, lows: Sequence[_Low], spec: AdapterSpec) -> dict[str, np.ndarray]:
    names = {leaf: name for leaf, (name, _) in one.leaves(spec).items()}
    low_A, low_B = [low.low_A for low in lows], [low.low_B for low in lows]
    if len(lows) > 1:  # A: expert after expert; B: the expert counts fastest
        made = {"lora_A": np.concatenate(low_A), "lora_B": np.stack(low_B, axis=-1).reshape(low_B[0].shape[0], -1)}
    elif one.unit.embedding:
        made = {"lora_A": low_A[0].T, "lora_B": low_B[0].T}
    else:
        made = {"lora_A": low_A[0], "lora_B": low_B[0]}
    if lows[0].magnitude is not None:
        made["magnitude"] = lows[0].magnitude
    if lows[0].bias is not None:
        made["lora_bias"] = lows[0].bias
    return {names[leaf]: value for leaf, value in made.items()}


def _unit(unit: Unit, flat: Flat, spec: AdapterSpec) -> list[_Low] | None:
    """The adapters of a unit's matrices, of one rank and scale; None if it has none."""
    lows = [_matrix(unit, pieces, flat, spec) for pieces in unit.matrices]
    present = [low for low in lows if low is not None]
    if not present:
        return None
    rank = max(low.rank for low in present)
    scale = present[0].scale if len({low.scale for low in present}) == 1 else 1.0
    return [_alike(low, unit, rank, scale) for low in lows]


def _alike(low: _Low | None, unit: Unit, rank: int, scale: float) -> _Low:
    """The same change with this rank and scale."""
    if low is None:
        return _Low(np.zeros((rank, unit.shape[1]), np.float32), np.zeros((unit.shape[0], rank), np.float32), scale)
    missing = rank - low.rank
    if not missing and low.scale == scale:
        return low
    low_B = low.low_B * np.float32(low.scale / scale)
    return _Low(np.pad(low.low_A, ((0, missing), (0, 0))), np.pad(low_B, ((0, 0), (0, missing))), scale)


def _matrix(unit: Unit, pieces: Sequence[Piece], flat: Flat, spec: AdapterSpec) -> _Low | None:
    parts = [_piece(piece, flat, spec) for piece in pieces]
    if not any(parts):
        return None
    if len(parts) == 1:
        return parts[0]
    first = next(part for part in parts if part)
    low_B = np.zeros((unit.shape[0], sum(part.rank for part in parts if part)), np.float32)
    bias = None if first.bias is None else np.zeros(unit.shape[0], np.float32)
    magnitude = None if first.magnitude is None else np.zeros(unit.shape[0], np.float32)
    if magnitude is not None and not all(parts):
        raise ConfigError(f"DoRA on a part of the fused {unit.name} has no PEFT form; target all of it")
    shared = all(part and np.array_equal(part.low_A, first.low_A) and part.scale == first.scale for part in parts)
    low_A, scale, column = first.low_A if shared else [], first.scale if shared else 1.0, 0
    for piece, part in zip(pieces, parts, strict=True):
        if part is None:
            continue
        columns = slice(0, part.rank) if shared else slice(column, column + part.rank)
        low_B[piece.rows, columns] = part.low_B * np.float32(part.scale / scale)
        column += part.rank
        if not shared:
            low_A.append(part.low_A)
        if bias is not None:
            bias[piece.rows] = part.bias * np.float32(part.scale / scale)
        if magnitude is not None:
            magnitude[piece.rows] = part.magnitude
    if shared:
        return _Low(low_A, low_B[:, : first.rank], scale, magnitude, bias)
    return _Low(np.concatenate(low_A), low_B, scale, magnitude, bias)


def _piece(piece: Piece, flat: Flat, spec: AdapterSpec) -> _Low | None:
    """The adapter of one module of the tree without padding, PiSSA's two parts joined; None: it has none."""
    if f"{piece.path}/lora_A" not in flat or flat[f"{piece.path}/scale"][piece.index[:1]] == 0:
        return None

    def leaf(name: str) -> np.ndarray | None:
        value = flat.get(f"{piece.path}/{name}")
        return None if value is None else value[piece.index]

    rank = spec.rank_of(*all_names(piece.name))
    low_A, low_B = leaf("lora_A")[:rank], leaf("lora_B")[: piece.size, :rank]
    if leaf("initial_lora_A") is not None:
        low_A = np.concatenate([low_A, leaf("initial_lora_A")[:rank]])
        low_B = np.concatenate([low_B, -leaf("initial_lora_B")[: piece.size, :rank]], axis=1)
    scale = float(flat[f"{piece.path}/scale"][piece.index[:1]])
    return _Low(low_A, low_B, scale, leaf("magnitude"), leaf("lora_bias"))


# ------------------------------------------------------------------------------------------------------------ copies


def _copies(
    flat: Flat, spec: AdapterSpec, config: ModelConfig, layout: str, form: str, exported: Sequence[Adapted]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What is trained in full: tensors by their names in the folder, and the names for `modules_to_save`.

    Raises:
      ConfigError: a part of a fused tensor, whose other parts are frozen.
    """
    if form == "parameters" and peft_units.has_two_forms(config, layout):
        layout = "fused_experts"
    table = rules.tensors(config, layout)
    wanted = {tensor.name: tensor for tensor in table}
    depth: dict[str, int] = {}
    for one in exported:
        depth[one.unit.module] = depth.get(one.unit.module, 0) + 1
    found, modules = {}, []
    for tensor in table:
        there = [part.path in flat for part in tensor.parts]
        if not any(there):
            continue
        if not all(there):
            missing = tensor.parts[there.index(False)].path
            raise ConfigError(
                f"{tensor.name} is one tensor in this model's checkpoints and can only be trained as a whole: name all "
                f"of it in modules_to_save (without {missing.removesuffix('/weight')} PEFT would have no place for it)"
            )
        value = _assembled(tensor, flat)
        module, _, name = tensor.name.rpartition(".")
        if f"{tensor.parts[0].path.removesuffix('/weight')}/trainable_tokens" in flat:
            found[f"{PREFIX}{module}.token_adapter.base_layer.{name}"] = value  # the base, as a grown model has it
            continue
        found[f"{PREFIX}{module}{'.base_layer' * depth.get(module, 0)}.{name}"] = value
        if module not in depth and not name.endswith("bias"):
            modules.append(module)
    if ties(flat, config):
        found[f"{PREFIX}lm_head.weight"] = flat["embed_tokens/weight"][: config.vocab_size]
    names = {name.rpartition(".")[0] for name in wanted}
    return found, _saved_names(modules, names, spec)


def ties(flat: Flat, config: ModelConfig) -> bool:
    """Whether a copy of the embedding is trained that is the head as well."""
    return config.tie_word_embeddings and "embed_tokens/weight" in flat and "embed_tokens/trainable_tokens" not in flat


def _assembled(tensor: rules.Tensor, flat: Flat) -> np.ndarray:
    if not any(flat[tensor.parts[0].path].strides):  # `check`: only shapes are wanted
        return np.broadcast_to(np.float32(0), tensor.shape)
    value = np.empty(tensor.shape, np.float32)
    for part in tensor.parts:
        piece = flat[part.path][part.index][tuple(slice(0, size) for size in part.shape)]
        value[part.select] = piece.T if part.transpose else piece
    return value


def _saved_names(modules: Sequence[str], names: set[str], spec: AdapterSpec) -> list[str]:
    """As the spec has them, if PEFT takes them for just these modules."""
    own = [name for name in spec.modules_to_save if any(module.endswith(name) for module in modules)]
    picked = {module for module in names if any(module.endswith(name) for name in own)}
    return list(own) if picked == set(modules) else peft_rules.saved_names(modules, names)
