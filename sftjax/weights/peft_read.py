"""An adapter folder of PEFT's as leaves of the tree."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft.spec import AdapterSpec, all_names
from sftjax.weights import files, peft_rules, peft_settings, peft_units, rules, safetensors
from sftjax.weights.peft_rules import PREFIX, Adapted
from sftjax.weights.peft_units import Unit

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LAYOUTS = ("plain", "phi3", "mixtral", "gpt_oss")
# What wrappers around modules leave in names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CONVERT = (
    f"; {PICKLE} is a pickle, which can run code when it is loaded: convert it there, with torch, by python -c "
    '"import torch; from safetensors import torch as s; '
    f"s.save_file({{k: v.contiguous() for k, v in torch.load('{PICKLE}', weights_only=True).items()}}, '{WEIGHTS}')\""
)
_EMBEDDING, _HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says and holds; no tensor has been read.

    `tensors`: `{name in PEFT's plain form: (name in the file, shape)}`.
    """

    folder: files.Folder
    spec: AdapterSpec
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    ensures_tying: bool

    @property
    def path(self) -> str:
        return str(self.folder.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.tensors.items()}

    def read(self) -> dict[str, np.ndarray]:
        """All tensors, float32."""
        found = {}
        with self.folder.open(WEIGHTS) as file:
            header = safetensors.read_header(file)
            for name, (own, shape) in self.tensors.items():
                found[name] = np.empty(shape, np.float32)
                header[own].read((), found[name])
        return found

    @property
    def vocab_rows(self) -> int | None:
        """How many tokens the embedding or head that it changes must have; None if it changes neither."""
        shapes, rows = self.shapes, []
        for module in (_EMBEDDING, _HEAD):
            for name in ("weight", "base_layer.weight", "lora_B.weight"):
                rows.append(shapes.get(f"{module}.{name}", (0,))[0])
            rows.append(shapes.get(f"{module}.lora_embedding_A", (0, 0))[1])
        rows += [max(ids) + 1 for _, ids in self.spec.trainable_token_indices]
        return max(rows) or None

    @property
    def unties(self) -> bool:
        """Whether it changes the embedding and the output head apart, so that they can't be one weight any more."""
        saved = [any(f"model.{module}".endswith(name) for name in self.spec.modules_to_save) for module in _TABLES]
        names = "\n".join(self.tensors)
        low = "embed_tokens.lora_embedding_" in names or f"{_HEAD}.lora_" in names
        rows = dict(self.spec.trainable_token_indices)
        apart = bool(rows) and "lm_head" in rows and rows.get("embed_tokens") != rows["lm_head"]
        return low or apart or (any(saved) and not self.ensures_tying)


_TABLES = ("embed_tokens", "lm_head")


def open_folder(directory: Any) -> AdapterFolder:
    """Reads an adapter folder's settings, and the names and shapes of its tensors.

    Raises:
      ConfigError: not a LoRA adapter, or one that needs what this code lacks.
      StorageError: files are missing or damaged.
    """
    folder = files.Folder(directory)
    settings = _read_settings(folder)
    spec = peft_settings.read(settings, f"{folder.path}/{CONFIG}")
    if WEIGHTS not in folder:
        raise ConfigError(f"{folder.path}: no {WEIGHTS}{_CONVERT if PICKLE in folder else ''}")
    with folder.open(WEIGHTS) as file:
        shapes = {name: tuple(stored.shape) for name, stored in safetensors.read_header(file).items()}
    return AdapterFolder(folder, spec, _plain_names(shapes), bool(settings.get("ensure_weight_tying")))


def _read_settings(folder: files.Folder) -> dict[str, Any]:
    if CONFIG not in folder:
        raise ConfigError(f"{folder.path}: no {CONFIG}, so not a PEFT adapter folder")
    try:
        settings = json.loads(folder.read_bytes(CONFIG))
    except ValueError as error:
        raise ConfigError(f"{folder.path}/{CONFIG}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder.path}/{CONFIG}: not a JSON object")
    return settings


def _plain_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names as PEFT writes them today.

    After `resize_token_embeddings` it writes a module to save three times: `weight`, `modules_to_save.weight` (the
    same) and `original_module.weight` (the base's, kept here under that name).
    """
    found = {}
    for own, shape in shapes.items():
        name = _WRAPPERS.sub("", own).removesuffix("lora_magnitude_vector.weight")
        name = f"{name}lora_magnitude_vector" if name.endswith(".") else name
        plain = re.sub(r"\.modules_to_save\.(?:default\.)?", ".", name)
        if plain != name and plain in shapes:
            continue
        found[plain] = (own, shape)
    return found


# ------------------------------------------------------------------------------------------------------------- leaves


def leaves(
    opened: AdapterFolder, base: ModelConfig, layout: str | None
) -> tuple[dict[str, np.ndarray], AdapterSpec, ModelConfig]:
    """The adapter as leaves by path, its spec, and the model that they belong to (untied where need be).

    Args:
      base: of the model as it is.
      layout: how its checkpoint names tensors; None: found from the names in the folder.

    Raises:
      ConfigError: not an adapter for this model; a module that PEFT would leave without what the folder has for it.
    """
    config = fitted(opened, base)
    layout = layout or _find_layout(opened, config)
    form, chosen = _choose_form(opened, config, layout)
    if opened.ensures_tying and base.tie_word_embeddings and any(one.unit.embedding for one in chosen):
        chosen = [*chosen, *_tied_adapter(opened, config, layout, chosen)]
    tensors, flat, seen = opened.read(), {}, set()
    shapes = rules.leaf_shapes(config)
    ranks: dict[str, int] = {}
    _check_complete(opened, chosen)
    for one in chosen:
        names = {leaf: name for leaf, (name, _) in one.leaves(opened.spec).items()}
        seen.update(names.values())
        _import(one, {leaf: tensors[name] for leaf, name in names.items()}, flat, shapes, ranks)
    spec = _explicit_ranks(opened.spec, ranks)
    _import_rows(opened, tensors, flat, seen, tied=config.tie_word_embeddings)
    copies = _import_copies(opened, tensors, config, layout, form, chosen, seen)
    if base.tie_word_embeddings and not config.tie_word_embeddings:
        copies |= _untied_head(opened, tensors, copies)
    for path, pieces in copies.items():
        flat[path] = np.zeros(shapes[path], np.float32)
        leading = math.prod(shapes[path][: len(pieces[0][0])])
        if len(pieces) != leading:
            raise ConfigError(f"{opened.path}: {path} is trained in {len(pieces)} of {leading} layers; all are needed")
        for index, value in pieces:
            flat[path][index] = value
    unknown = sorted(set(tensors) - seen)
    if unknown:
        why = "fit nothing in this model"
        if any(".lora_" in name for name in unknown) and _is_untargeted(unknown[0], config, layout, form):
            why = f"are of modules that {CONFIG} doesn't target, so PEFT would leave them out"
        raise ConfigError(f"{opened.path}: {len(unknown)} tensors {why}, e.g. {unknown[0]!r}")
    return flat, spec, config


def fitted(opened: AdapterFolder, config: ModelConfig) -> ModelConfig:
    """The configuration of a model that the adapter can stand beside: untied, where it changes both sides apart."""
    if config.tie_word_embeddings and opened.unties:
        return config.replace(tie_word_embeddings=False)
    return config


def _tied_adapter(opened: AdapterFolder, config: ModelConfig, layout: str, chosen: Sequence[Adapted]) -> list[Adapted]:
    """The head's adapter that PEFT ties to the embedding's, by `ensure_weight_tying`; the folder has both."""
    head = next(unit for unit in peft_units.units(config, layout) if unit.module == "lm_head")
    if any(one.unit.module == "lm_head" for one in chosen):
        return []
    return [Adapted(head, "lm_head", opened.spec.rank_of("lm_head"), opened.spec.scale_of("lm_head"), _HEAD)]


def _find_layout(opened: AdapterFolder, config: ModelConfig) -> str:
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in opened.tensors if ".lora_" in name}
    modules = {name.replace(".base_layer", "") for name in modules}
    for layout in LAYOUTS:
        known = {unit.module for form in peft_units.FORMS for unit in peft_units.units(config, layout, form)}
        if modules <= known:
            return layout
    return "plain"


def _choose_form(opened: AdapterFolder, config: ModelConfig, layout: str) -> tuple[str, list[Adapted]]:
    """The form of the experts that fits the folder's tensors best."""
    best: tuple[int, str, list[Adapted]] | None = None
    for form in peft_units.FORMS:
        try:
            chosen = peft_rules.adapted(opened.spec, peft_units.units(config, layout, form))
        except ConfigError:
            if best is None and form == peft_units.FORMS[-1]:
                raise
            continue
        wanted = {name for one in chosen for name, _ in one.leaves(opened.spec).values()}
        known = wanted | set(peft_rules.base_names(chosen, peft_units.tensor_shapes(config, layout, form)))
        count = len(known & set(opened.tensors)) - len(wanted - set(opened.tensors))
        if best is None or count > best[0]:
            best = (count, form, chosen)
    assert best is not None
    return best[1], best[2]


def _check_complete(opened: AdapterFolder, chosen: Sequence[Adapted]) -> None:
    shapes, missing = opened.shapes, []
    for one in chosen:
        for name, shape in one.leaves(opened.spec).values():
            have = shapes.get(name)
            if have is None:
                missing.append(name)
            elif have != shape and math.prod(have) != math.prod(shape):
                rank = have[0] if name.endswith(("lora_A.weight", "lora_embedding_A")) else have[-1]
                rank //= len(one.unit.matrices)
                where = f"{opened.path}: {one.unit.name} is {list(one.unit.shape)}"
                if rank != one.rank and len(have) == 2:
                    raise ConfigError(f"{where}; it has rank {rank}, its configuration says {one.rank}")
                raise ConfigError(f"{where}, and its {name.removeprefix(PREFIX)} is {list(have)}, not {list(shape)}")
    if missing:
        raise ConfigError(
            f"{opened.path}: {CONFIG} targets modules for which there is no tensor, {len(missing)} of them, "
            f"e.g. {missing[0]!r}"
        )


def _is_untargeted(name: str, config: ModelConfig, layout: str, form: str) -> bool:
    module = name.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "")
    return any(unit.module == module for unit in peft_units.units(config, layout, form))


def _import(one: Adapted, arrays: Mapping[str, np.ndarray], flat: dict, shapes: Mapping, ranks: dict[str, int]) -> None:
    """Writes one unit's tensors into the stacked leaves of its pieces."""
    rank, unit = one.rank, one.unit
    for pieces, low_A, low_B in _matrices(unit, arrays["lora_A"], arrays["lora_B"]):
        for piece in pieces:
            ranks[piece.name] = max(rank, ranks.get(piece.name, 0))
            columns = unit.shape[1]
            leading = shapes[f"{piece.path}/weight"][:-2]
            scale = flat.setdefault(f"{piece.path}/scale", np.zeros(leading[:1], np.float32))
            ratio = np.float32(1.0)
            if len(piece.index) > 1 and scale[piece.index[0]] != 0:  # experts of a layer share their scale
                ratio = np.float32(one.scale / scale[piece.index[0]])
            else:
                scale[piece.index[:1]] = one.scale
            block = low_B[piece.rows] if ratio == 1 else low_B[piece.rows] * ratio
            _grow(flat, f"{piece.path}/lora_A", (*leading, rank, columns), axis=-2)[piece.index][:rank] = low_A
            _grow(flat, f"{piece.path}/lora_B", (*leading, piece.size, rank), axis=-1)[piece.index][:, :rank] = block
            for leaf, start in (("magnitude", 1.0), ("lora_bias", 0.0)):
                if leaf in arrays:
                    values = arrays[leaf].reshape(-1)
                    values = values if unit.embedding else values[piece.rows]
                    whole = flat.setdefault(
                        f"{piece.path}/{leaf}", np.full((*leading, values.shape[0]), start, np.float32)
                    )
                    whole[piece.index] = values


def _matrices(unit: Unit, low_A: np.ndarray, low_B: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Pieces, A `[R, in]` and B `[out, R]` of each of a unit's matrices."""
    count = len(unit.matrices)
    if unit.embedding:
        yield unit.matrices[0], low_A.T, low_B.T
    elif count == 1:
        yield unit.matrices[0], low_A, low_B
    else:  # A: expert after expert; B: the expert counts fastest
        each_A, each_B = low_A.reshape(count, -1, low_A.shape[1]), low_B.reshape(low_B.shape[0], -1, count)
        for expert, pieces in enumerate(unit.matrices):
            yield pieces, each_A[expert], each_B[:, :, expert]


def _grow(flat: dict[str, np.ndarray], path: str, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The leaf of at least this shape, zeros where nothing was written."""
    old = flat.get(path)
    if old is None:
        flat[path] = np.zeros(shape, np.float32)
    elif old.shape[axis] < shape[axis]:
        flat[path] = np.zeros(shape, np.float32)
        flat[path][tuple(slice(0, size) for size in old.shape)] = old
    return flat[path]


def _import_rows(opened: AdapterFolder, tensors: Mapping, flat: dict, seen: set[str], *, tied: bool) -> None:
    for module, rows in opened.spec.trainable_token_indices:
        name = f"{_EMBEDDING if module == 'embed_tokens' else _HEAD}.token_adapter.trainable_tokens_delta"
        if name not in tensors:
            if module == "lm_head" and tied:
                continue  # the embedding's rows are its own
            raise ConfigError(f"{opened.path}: no {name}, the rows of trainable_token_indices")
        seen.add(name)
        if tied:  # written once more after `resize_token_embeddings`
            seen.update({f"{_HEAD}.token_adapter.trainable_tokens_delta"} & set(tensors))
        if tensors[name].shape[0] != len(rows):
            raise ConfigError(f"{opened.path}: {name} has {tensors[name].shape[0]} rows for {len(rows)} tokens")
        flat[f"{module}/trainable_tokens"] = tensors[name]
        flat[f"{module}/token_indices"] = np.asarray(rows, np.int32)


def _import_copies(
    opened: AdapterFolder,
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    layout: str,
    form: str,
    chosen: Sequence[Adapted],
    seen: set[str],
) -> dict[str, list]:
    """`{path: [(index, value), ...]}` of modules trained in full, of biases, and of a base that was changed."""
    if form == "parameters" and peft_units.has_two_forms(config, layout):
        layout = "fused_experts"
    depth: dict[str, int] = {}
    for one in chosen:
        depth[one.unit.module] = depth.get(one.unit.module, 0) + 1
    copies: dict[str, list] = {}
    for tensor in rules.tensors(config, layout):
        module, _, name = tensor.name.rpartition(".")
        original = f"{PREFIX}{module}.original_module.{name}"
        seen.update({original} & set(tensors))
        inner = f"{PREFIX}{module}.token_adapter.base_layer.{name}"
        key = f"{PREFIX}{module}{'.base_layer' * depth.get(module, 0)}.{name}"
        key = inner if inner in tensors else key
        if key not in tensors:
            continue
        seen.add(key)
        if tensors[key].shape != tensor.shape:
            raise ConfigError(f"{opened.path}: {key} has shape {tensors[key].shape}; this model's is {tensor.shape}")
        for part in tensor.parts:
            value = tensors[key][part.select]
            copies.setdefault(part.path, []).append((part.index, value.T if part.transpose else value))
    if config.tie_word_embeddings:
        _import_tied_head(opened, tensors, copies, seen)
    return copies


def _import_tied_head(opened: AdapterFolder, tensors: Mapping, copies: dict[str, list], seen: set[str]) -> None:
    """The head of a tied model is the embedding: the folder may have it too, but not another."""
    for name in ("weight", "base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight"):
        key = f"{_HEAD}.{name}"
        if key not in tensors:
            continue
        seen.add(key)
        if name == "original_module.weight":
            continue
        head, table = tensors[key], copies.get("embed_tokens/weight")
        if table is not None and not np.array_equal(head, table[0][1]):
            raise ConfigError(f"{opened.path}: {key} differs from the embedding, and this model keeps them tied")
        copies["embed_tokens/weight"] = [((), head)]


def _untied_head(opened: AdapterFolder, tensors: Mapping, copies: Mapping[str, list]) -> dict[str, list]:
    """The other side of a tied weight whose first side is trained: as the folder has the base, if it has it at all."""
    found = {}
    saved = [any(f"model.{module}".endswith(name) for name in opened.spec.modules_to_save) for module in _TABLES]
    for module, other, is_saved in (("lm_head", _EMBEDDING, saved[1]), ("embed_tokens", _HEAD, saved[0])):
        if is_saved or f"{module}/weight" in copies:
            continue
        for name in ("original_module.weight", "base_layer.weight"):
            value = tensors.get(f"{other}.{name}")
            if value is not None:
                found[f"{module}/weight"] = [((), value)]
                break
    return found


def _explicit_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """The spec, with ranks spelled out where its patterns don't give them (they named single experts)."""
    wrong = {re.escape(name): rank for name, rank in ranks.items() if spec.rank_of(*all_names(name)) != rank}
    return spec.replace(rank_pattern=(*wrong.items(), *spec.rank_pattern)) if wrong else spec
