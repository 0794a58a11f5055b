"""adapter_config.json: an `AdapterSpec` in PEFT's words, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft.spec import AdapterSpec

PEFT_VERSION = "0.21.2"

# Fields that change the maths and that we don't have: they must be off.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def write(
    spec: AdapterSpec,
    config: ModelConfig,
    modules: list[str],
    exported: Mapping[str, tuple[int, float]],
    base_model: str | None,
) -> dict[str, Any]:
    """adapter_config.json."""
    doubled = 2 if spec.pissa else 1
    rank, alpha = spec.rank * doubled, spec.alpha * (math.sqrt(doubled) if spec.use_rslora else doubled)
    rank_pattern = {name: value * doubled for name, value in spec.rank_pattern}
    grow = math.sqrt(doubled) if spec.use_rslora else doubled
    alpha_pattern = {name: value * grow for name, value in spec.alpha_pattern}
    plain = spec.replace(rank=rank, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    if any(
        plain.rank_of(name) != r or not math.isclose(plain.scale_of(name), s, rel_tol=1e-6)
        for name, (r, s) in exported.items()
    ):
        # what the spec says of parts isn't true of the fused whole: spell it out
        rank_pattern = {re.escape(name): r for name, (r, _) in exported.items()}
        alpha_pattern = {
            re.escape(name): s * (math.sqrt(r) if spec.use_rslora else r) for name, (r, s) in exported.items()
        }
    saved = list(spec.modules_to_save)
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {name: _whole(value) for name, value in alpha_pattern.items()},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": spec.bias,
        "corda_config": None,
        "ensure_weight_tying": config.tie_word_embeddings and any(name.endswith("embed_tokens") for name in saved),
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if spec.init == "default" or spec.pissa else spec.init,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": _whole(alpha),
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": saved or None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": target_names(modules, exported),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": spec.use_dora,
        "use_qalora": False,
        "use_rslora": spec.use_rslora,
        "velora_config": None,
    }


def target_names(modules: list[str], chosen: Mapping[str, Any]) -> list[str]:
    """The shortest list of names that picks exactly the chosen modules: endings where all that end so are chosen."""
    partial = {name.rpartition(".")[2] for name in modules if name not in chosen}
    return sorted({ending if (ending := name.rpartition(".")[2]) not in partial else name for name in chosen})


def _whole(number: float) -> int | float:
    number = float(f"{number:.7g}")  # scales are float32
    return int(number) if number.is_integer() else number


def read(settings: Mapping[str, Any], where: str) -> AdapterSpec:
    """The spec that adapter_config.json describes; missing fields have PEFT's defaults."""
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type {settings.get('peft_type')!r}; only LORA adapters load")
    for field in _UNSUPPORTED:
        if settings.get(field):
            raise ConfigError(f"{where}: {field}={settings[field]!r} isn't supported")
    targets = settings.get("target_modules")
    if not targets:
        raise ConfigError(f"{where}: target_modules is missing")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian",):
        raise ConfigError(f"{where}: init_lora_weights={init!r} changes the base; save it converted to a plain LoRA")
    layers = settings.get("layers_to_transform")
    return AdapterSpec(
        rank=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        exclude_modules=_exclude(settings.get("exclude_modules")),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        init=init if isinstance(init, str) else "default",
        modules_to_save=tuple(settings.get("modules_to_save") or ()),
        bias=settings.get("bias", "none"),
    )


def _exclude(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())
