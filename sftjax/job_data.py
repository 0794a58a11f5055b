"""What a configuration means for the data: sources, how they are mixed and held out, and how samples become batches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sftjax import config as config_lib
from sftjax.data import subsets
from sftjax.data.encode import encoder_of
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.sources import MIXTURE_KEYS, check_spec, open_source
from sftjax.errors import ConfigError
from sftjax.parallel import partition

# Fields of `data` that the encoder of rows takes by the same name.
ENCODING = ("on_mask_error", "control_text", "fold_system", "allow_lost", "close_thoughts")


def source_spec(entry: Any) -> dict[str, Any]:
    if isinstance(entry, (str, os.PathLike)):
        return {"path": os.fspath(entry)}
    if not isinstance(entry, (Mapping, config_lib.ConfigDict)):
        raise ConfigError(f"data source: {entry!r} is neither a path nor a dict with one")
    return dict(entry)


def check_sources(config: config_lib.ConfigDict) -> None:
    """Raises ConfigError for entries that name sources in a way that can't be, before anything is opened."""
    for group, field in (("data", "train"), ("data", "replay"), ("data", "eval"), ("eval", "forgetting")):
        for entry in config[group][field]:
            try:
                check_spec(source_spec(entry))
            except ConfigError as error:
                raise ConfigError(f"{group}.{field}: {error}") from None


def ingredient(
    config: config_lib.ConfigDict, tokenizer, entry: Any, *, format: str, replay: bool = False
) -> Ingredient:
    """A source and how its rows are encoded, from an entry such as those of `data.train`."""
    spec = source_spec(entry)
    share = {key: spec.pop(key) for key in MIXTURE_KEYS if key in spec}
    format, fields = spec.pop("format", format), spec.pop("fields", {})
    source = open_source(spec)
    encode = encoder_of(
        source,
        tokenizer,
        format=format,
        fields=fields,
        train_on=config.data.train_on,
        system=config.data.system or None,
        **{name: config.data[name] for name in ENCODING},
    )
    return Ingredient(source, encode, **share, replay=replay)


def open_plain_text(config: config_lib.ConfigDict, tokenizer) -> Mixture | None:
    """The plain text of `eval.forgetting` (None without)."""
    sources = [ingredient(config, tokenizer, entry, format="text") for entry in config.eval.forgetting]
    if config.data.max_eval_rows:
        sources = subsets.first_rows(sources, config.data.max_eval_rows)
    return Mixture(sources, shuffle=False, epochs=1) if sources else None


def check_metric(config: config_lib.ConfigDict, held_out: Mixture | None, plain_text: Mixture | None) -> None:
    """Raises ConfigError where the metric that the best checkpoint is chosen by won't be measured."""
    measured: list[str] = []
    if held_out is not None:
        measured += ["eval_loss", "eval_perplexity", "eval_mean_token_accuracy"]
        measured += [f"eval_loss/{name}" for name in held_out.names] if len(held_out.names) > 1 else []
        measured += ["kl_to_base"] if config.eval.kl_tokens else []
    if plain_text is not None:
        measured += ["plain_text_loss", "plain_text_perplexity"]
    if measured and config.eval.metric_for_best_model not in measured:
        raise ConfigError(
            f"eval.metric_for_best_model={config.eval.metric_for_best_model!r} is not measured in this run; measured "
            f"are {', '.join(measured)}"
        )


def open_data(config: config_lib.ConfigDict, tokenizer) -> tuple[Mixture, Mixture | None]:
    """The training mixture and the held-out one (None without)."""
    data = config.data
    train_sources = [ingredient(config, tokenizer, entry, format=data.format) for entry in data.train]
    train_sources += [ingredient(config, tokenizer, entry, format="text", replay=True) for entry in data.replay]
    held_sources = [ingredient(config, tokenizer, entry, format=data.format) for entry in data.eval]
    if data.eval_fraction and not held_sources:
        train_sources, held_sources = subsets.hold_out(train_sources, data.eval_fraction, config.seed)
    if data.max_eval_rows:
        held_sources = subsets.first_rows(held_sources, data.max_eval_rows)
    mixture = Mixture(
        train_sources,
        seed=config.seed,
        shuffle=data.shuffle,
        epochs=None if config.train.max_steps else config.train.num_train_epochs,
        temperature=data.mixing_temperature,
        replay_share=data.replay_share,
        shares_of=data.shares_of,
        curriculum=data.curriculum or None,
        descending=data.curriculum_descending,
    )
    held_out = Mixture(held_sources, shuffle=False, epochs=1) if held_sources else None
    return mixture, held_out


def batching_options(config: config_lib.ConfigDict, mesh) -> dict[str, Any]:
    """How samples become batches: what the preflight counts with and the pipeline does."""
    accumulation, flat_rows = config.train.gradient_accumulation_steps, partition.batch_shards(mesh)
    micro_rows = config_lib.rows_per_step(config) // accumulation
    fill, segments = "sequences", config.data.max_segments
    if config.data.packing == "padding_free" and config.train.batch_tokens:
        # a flat row is as long as several others, and may hold as many samples as they together
        fill, segments = "tokens", (segments - 1) * (micro_rows // flat_rows) + 1
    return {
        "length": config.data.max_length,
        "batch_size": micro_rows,
        "accumulation": accumulation,
        "packing_strategy": config.data.packing,
        "max_segments": segments,
        "packing_bins": config.data.packing_bins or None,
        "static_lengths": config.data.static_lengths,
        "flat_rows": flat_rows,
        "fill": fill,
        "overlong": config.data.over_length,
        "max_dropped": config.data.max_dropped_fraction,
    }
