"""adapter_config.json: an `AdapterSpec` in PEFT's words, and back. Every field of PEFT's LoraConfig is accounted for.

read and written     r, lora_alpha, target_modules, rank_pattern, ... : those of `AdapterSpec`
without effect       once an adapter is trained: how it was initialised, from what, on what hardware
refused by name      what changes the maths and isn't here, and what isn't known
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftjax.errors import ConfigError
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import peft_rules
from sftjax.weights.peft_rules import Adapted
from sftjax.weights.peft_units import Unit

PEFT_VERSION = "0.21.2"

# Written as they are here. Most are what `LoraConfig()` has.
_CONSTANT = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "task_type": "CAUSAL_LM",
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
    "modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying", "peft_type",
}  # fmt: skip
_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "fan_in_fan_out",  # PEFT itself takes it back where the module is a linear one
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config",
}  # fmt: skip
# How A and B began makes no difference to what they are now, unless the base was changed with them.
_INITS = {True: "default", False: "default", "gaussian": "gaussian", "orthogonal": "orthogonal"}
_OTHER_INITS = ("eva", "mica")
_CHANGES_THE_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")


def read(settings: Mapping[str, Any], where: str) -> AdapterSpec:
    """The spec that adapter_config.json describes; missing fields have PEFT's defaults.

    Raises:
      ConfigError: naming the field that this code lacks, or doesn't know.
    """
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type {settings.get('peft_type')!r}; only LORA adapters load")
    for field, value in settings.items():
        if field not in _READ | _NO_EFFECT and value:
            raise ConfigError(f"{where}: {field}={value!r} isn't supported")
    targets, parameters = settings.get("target_modules"), settings.get("target_parameters")
    if not targets and not parameters:
        raise ConfigError(f"{where}: target_modules is missing")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and _CHANGES_THE_BASE.fullmatch(init.lower()):
        raise ConfigError(
            f"{where}: init_lora_weights={init!r} changes the base; save it converted to a plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    if init not in _INITS and init not in _OTHER_INITS:
        raise ConfigError(f"{where}: init_lora_weights={init!r} isn't known")
    rows = settings.get("trainable_token_indices") or ()
    if isinstance(rows, Mapping):
        rows = {name.rpartition(".")[2]: ids for name, ids in rows.items()}
    layers, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern")
    try:
        return AdapterSpec(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
            target_parameters=tuple(parameters or ()),
            exclude_modules=_names(settings.get("exclude_modules")),
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern or ()),
            rank_pattern=settings.get("rank_pattern") or {},
            alpha_pattern=settings.get("alpha_pattern") or {},
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            lora_bias=bool(settings.get("lora_bias")),
            init=_INITS.get(init, "default") if not settings.get("lora_bias") else "default",
            modules_to_save=tuple(settings.get("modules_to_save") or ()),
            trainable_token_indices=rows,
            bias=settings.get("bias", "none"),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"{where}: a field has the wrong type or value ({error})") from error


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def write(
    spec: AdapterSpec,
    exported: Sequence[Adapted],
    units: Sequence[Unit],
    *,
    parameters: Iterable[str] = (),
    saved: Sequence[str] = (),
    rows: Mapping[str, Sequence[int]] | None = None,
    ties: bool = False,
    base_model: str | None = None,
) -> dict[str, Any]:
    """adapter_config.json.

    Args:
      exported: what was adapted, as it is written; ranks and scales may differ from the spec's where parts were fused.
      units: of the model, in the form that is written.
      parameters: names of those units that go into target_parameters.
      saved: names for `modules_to_save`.
      rows: trained rows by module.
      ties: the copy of the embedding is the output head as well.
    """
    experts = [one for one in exported if one.unit.is_expert]
    plain, rslora = _plain(spec, experts), spec.use_rslora and not experts
    rank_pattern, alpha_pattern = dict(plain.rank_pattern), dict(plain.alpha_pattern)
    if not _holds(plain, exported):
        rank_pattern, alpha_pattern = _spelt_out(plain, exported)
    modules, parameters = _targets(exported, units, set(parameters))
    only_embedding = rows and list(rows) == ["embed_tokens"]
    return _CONSTANT | {
        "alpha_pattern": {name: _whole(value) for name, value in alpha_pattern.items()},
        "base_model_name_or_path": base_model,
        "bias": spec.bias,
        "ensure_weight_tying": ties,
        "init_lora_weights": True if spec.init == "default" or spec.pissa else spec.init,
        "lora_alpha": _whole(plain.alpha),
        "lora_bias": spec.lora_bias,
        # PEFT refuses dropout beside parameters, and an adapter that is exported isn't trained further by it
        "lora_dropout": 0.0 if experts or parameters else spec.dropout,
        "modules_to_save": list(saved) or None,
        "r": plain.rank,
        "rank_pattern": rank_pattern,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "trainable_token_indices": (list(rows["embed_tokens"]) if only_embedding else _lists(rows)) if rows else None,
        "use_dora": spec.use_dora,
        "use_rslora": rslora,
    }


def _lists(rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(ids) for name, ids in rows.items()}


def _plain(spec: AdapterSpec, experts: Sequence[Adapted]) -> AdapterSpec:
    """The spec of a plain LoRA: PiSSA's ranks doubled; beside experts without rsLoRA, which PEFT scales wrongly there.

    (PEFT doubles their ranks for transformers 5, and alpha with them, which keeps alpha / rank only.)
    """
    doubled = 2 if spec.pissa else 1
    grow = math.sqrt(doubled) if spec.use_rslora else doubled
    plain = spec.replace(
        rank=spec.rank * doubled,
        alpha=spec.alpha * grow,
        rank_pattern=tuple((name, value * doubled) for name, value in spec.rank_pattern),
        alpha_pattern=tuple((name, value * grow) for name, value in spec.alpha_pattern),
    )
    if not experts:
        return plain
    first = experts[0]
    return plain.replace(rank=first.rank, alpha=first.scale * first.rank, use_rslora=False)


def _holds(spec: AdapterSpec, exported: Iterable[Adapted]) -> bool:
    return all(
        spec.rank_of(one.key) == one.rank and peft_rules.same_scales(spec.scale_of(one.key), one.scale)
        for one in exported
    )


def _spelt_out(spec: AdapterSpec, exported: Sequence[Adapted]) -> tuple[dict[str, int], dict[str, float]]:
    """Patterns that say rank and alpha where they aren't the usual ones: for all of an ending if they are alike."""

    def alpha(one: Adapted) -> float:
        return one.scale * (math.sqrt(one.rank) if spec.use_rslora else one.rank)

    ranks, alphas = {}, {}
    kinds: dict[str, set[tuple[int, float]]] = {}
    for one in exported:
        kinds.setdefault(_ending(one.key), set()).add((one.rank, float(f"{alpha(one):.7g}")))
    for one in exported:
        ending = _ending(one.key)
        name = ending if len(kinds[ending]) == 1 else re.escape(one.key)
        if one.rank != spec.rank:
            ranks[name] = one.rank
        if not peft_rules.same_scales(alpha(one), spec.alpha):
            alphas[name] = alpha(one)
    return ranks, alphas


def _targets(exported: Sequence[Adapted], units: Sequence[Unit], parameters: set[str]) -> tuple[list[str], list[str]]:
    """Names for target_modules and target_parameters that pick exactly what was adapted."""
    keys = {one.key for one in exported}
    modules = [unit.module for unit in units if unit.name not in parameters]
    others = [peft_rules.parameter_name(unit) for unit in units if unit.name in parameters]
    return target_names(modules, keys), target_names(others, keys)


def target_names(names: Sequence[str], chosen: Iterable[str]) -> list[str]:
    """The shortest list of names that picks exactly the chosen ones: endings where all that end so are chosen."""
    chosen = set(chosen) & set(names)
    partial = {_ending(name) for name in names if name not in chosen}
    return sorted({ending if (ending := _ending(name)) not in partial else name for name in chosen})


def _ending(name: str) -> str:
    """The last part of a module's name, of a parameter's those that name its module."""
    return ".".join(
        name.split(".")[-3 if name.endswith((".weight", "experts.gate_up_proj", "experts.down_proj")) else -1 :]
    )


def _whole(number: float) -> int | float:
    number = float(f"{number:.7g}")  # scales are float32
    return int(number) if number.is_integer() else number
