"""The one schema of a run: every field with its default, locked, and the checks that span fields.

A config file is Python with `get_config(arg)`; it starts from `defaults()` and sets what differs. Names follow the ones
users of other SFT tools know. Only `main`, `train` and the tools see the ConfigDict; everything below takes
plain arguments.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

import fsspec
import ml_collections

from sftjax import paths
from sftjax.aliases import ALIASES
from sftjax.errors import ConfigError

ConfigDict = ml_collections.ConfigDict

CHOICES = {
    "model.params_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16", "float16"),
    "model.remat": ("none", "full", "dots", "attention"),
    "data.packing": ("first_fit", "best_fit", "none", "padding_free"),
    "data.over_length": ("drop", "truncate", "split", "error"),
    "data.shares_of": ("rows", "tokens"),
    "data.train_on": ("all", "last", "weights"),
    "data.on_mask_error": ("raise", "drop", "unroll"),
    "data.control_text": ("plain", "error"),
    "train.loss_reduction": ("token", "example"),
    "train.lr_scheduler_type": ("cosine", "linear", "constant", "wsd"),
    "peft.method": ("none", "lora", "dora", "houlsby", "pfeiffer"),
    "peft.quantization": ("none", "nf4", "int8"),
    "peft.bias": ("none", "all", "lora_only"),
    "peft.bottleneck_activation": ("relu", "gelu", "silu", "tanh"),
    "export.dtype": ("float32", "bfloat16", "float16"),
    "export.merge_into": ("dequantized", "original"),
    "export.checkpoint": ("best", "last"),
}

# What a number may be, as mathematicians write it; every other float has to be finite at least.
RANGES = {
    "model.scan_unroll": "[1, inf)",
    "model.attention_dropout": "[0, 1)",
    "model.residual_dropout": "[0, 1)",
    "model.embedding_dropout": "[0, 1)",
    "model.pad_vocab_to_multiple_of": "[1, inf)",
    "data.replay_share": "[0, 1)",
    "data.mixing_temperature": "(0, inf)",
    "data.eval_fraction": "[0, 1)",
    "data.max_eval_rows": "[0, inf)",
    "data.packing_bins": "[0, inf)",
    "data.static_lengths": "[1, inf)",
    "data.max_dropped_fraction": "[0, 1]",
    "data.workers": "[0, inf)",
    "data.preflight_rows": "[1, inf)",
    "train.batch_tokens": "[0, inf)",
    "train.gradient_accumulation_steps": "[1, inf)",
    "train.num_train_epochs": "[0, inf)",
    "train.max_steps": "[0, inf)",
    "train.learning_rate": "[0, inf)",
    "train.min_lr_ratio": "[0, 1]",
    "train.decay_ratio": "[0, 1]",
    "train.warmup_ratio": "[0, 1]",
    "train.warmup_steps": "[0, inf)",
    "train.adam_beta1": "[0, 1)",
    "train.adam_beta2": "[0, 1)",
    "train.adam_epsilon": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.max_grad_norm": "[0, inf)",
    "train.neftune_noise_alpha": "[0, inf)",
    "train.max_nonfinite_steps": "[1, inf)",
    "train.logging_steps": "[1, inf)",
    "peft.r": "[1, inf)",
    "peft.lora_dropout": "[0, 1)",
    "peft.loraplus_lr_ratio": "(0, inf)",
    "peft.bottleneck_size": "[1, inf)",
    "eval.eval_steps": "[0, inf)",
    "eval.batch_size": "[0, inf)",
    "eval.early_stopping_patience": "[0, inf)",
    "eval.kl_tokens": "[0, inf)",
    "eval.num_samples": "[0, inf)",
    "eval.max_new_tokens": "[1, inf)",
    "eval.temperature": "[0, inf)",
    "eval.top_k": "[0, inf)",
    "eval.top_p": "(0, 1]",
    "eval.repetition_penalty": "(0, inf)",
    "checkpoint.save_steps": "[0, inf)",
    "checkpoint.save_total_limit": "[1, inf)",
}


def defaults() -> ConfigDict:
    """A complete, locked configuration; `model.path` and `data.train` are what a run must set."""
    config = ConfigDict()
    config.seed = 0
    config.run_dir = "runs/sft"

    config.model = ConfigDict()
    config.model.path = ""  # HF folder, .gguf file, or hub id
    # Of the trained weights, which are the optimizer's masters; bfloat16 ones are rounded stochastically.
    config.model.params_dtype = "float32"
    config.model.frozen_dtype = "bfloat16"  # of weights that aren't trained (PEFT)
    config.model.compute_dtype = "bfloat16"  # float16, with a loss scale that adapts: for GPUs without bfloat16 (T4)
    config.model.remat = "full"
    config.model.attention = ""  # a kernel's name; empty: the first that can do the job
    config.model.scan_unroll = 1
    config.model.attention_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.embedding_dropout = 0.0
    config.model.chat_template = ""  # built-in name or file; empty: the tokenizer's own
    config.model.end_of_turn = ""  # the token generation stops on; empty: the template's own
    config.model.template_kwargs = ConfigDict()  # the chat template's variables, such as {"enable_thinking": False}
    config.model.add_tokens = ()  # special tokens that a template of one's own needs; their rows are trained
    config.model.pad_vocab_to_multiple_of = 1

    config.data = ConfigDict()
    # Paths or dicts: path, format, split ("[:1000]"), fields, name, weight or proportion, max_epochs, loss_weight.
    config.data.train = ()
    config.data.replay = ()  # plain text as in pre-training, mixed in against forgetting; every token is trained
    config.data.replay_share = 0.0  # of the whole mixture: 0.05 to 0.1 is usual
    config.data.shares_of = "rows"  # what proportions and the replay share are counted in
    config.data.mixing_temperature = 1.0  # above 1 evens the sources out
    config.data.curriculum = ""  # within an epoch rows come in ascending order of "length", or of a numeric field
    config.data.curriculum_descending = False
    config.data.eval = ()  # held-out sources; empty: `eval_fraction` of the training rows
    config.data.eval_fraction = 0.0
    config.data.max_eval_rows = 0  # 0: all
    config.data.format = "auto"
    config.data.max_length = 2048
    config.data.over_length = "truncate"
    config.data.packing = "best_fit"
    config.data.packing_bins = 0  # rows kept open at once; 0: by the length
    config.data.max_segments = 32  # of a row, the padding behind its samples included
    config.data.static_lengths = 4  # sizes that unpacked and padding-free rows are padded to; each is compiled once
    config.data.train_on = "all"
    config.data.on_mask_error = "unroll"
    config.data.system = ""  # system text of conversations that have none
    config.data.fold_system = False  # write it in front of the first user message, for templates without that role
    config.data.control_text = "plain"  # text that spells a control token: it stays text, or the row is an error
    config.data.close_thoughts = False  # where the prompt opens a thought and an answer has none: train an empty one
    config.data.allow_lost = ()  # parts that a chat template may leave out, such as "reasoning" (docs/guide.md)
    config.data.max_lost_fraction = 0.05  # of the rows, that may lack a part of the prompt
    config.data.max_dropped_fraction = 0.1
    config.data.shuffle = True
    config.data.workers = 0
    config.data.preflight_rows = 20_000  # above this the preflight samples

    config.train = ConfigDict()
    config.train.batch_size = 16  # sequences in an optimizer step, over all devices and micro-batches
    config.train.batch_tokens = 0  # the same in tokens; overrides batch_size
    config.train.gradient_accumulation_steps = 1
    config.train.num_train_epochs = 1.0
    config.train.max_steps = 0  # 0: by epochs
    config.train.loss_reduction = "token"  # what counts alike in a step's loss; evaluation is always by token
    config.train.learning_rate = 2e-5
    config.train.lr_scheduler_type = "cosine"
    config.train.min_lr_ratio = 0.0  # where cosine, linear and wsd end, as a part of the learning rate
    config.train.decay_ratio = 0.1  # wsd: the share of the steps at the end in which it falls
    config.train.warmup_ratio = 0.03
    config.train.warmup_steps = 0  # overrides the ratio
    config.train.optim = "adamw"
    config.train.offload_optimizer = False  # its state waits in the host's memory between updates
    config.train.adam_beta1 = 0.9
    config.train.adam_beta2 = 0.999
    config.train.adam_epsilon = 1e-8
    config.train.weight_decay = 0.0
    config.train.weight_decay_regex = ""  # over "<collection>/<path>"; empty: all but biases and norms
    config.train.max_grad_norm = 1.0
    config.train.neftune_noise_alpha = 0.0
    config.train.max_nonfinite_steps = 5  # in a row, then the run stops
    config.train.logging_steps = 1

    config.peft = ConfigDict()
    config.peft.method = "none"
    # How the frozen base's projections are kept: nf4 (4 bits, block maxima quantised again: QLoRA), or int8 by output.
    config.peft.quantization = "none"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.peft.lora_dropout = 0.0
    config.peft.target_modules = ("all-linear",)  # names or endings, one regex, or all-linear (all but the head)
    config.peft.target_parameters = ()  # of fused experts, as PEFT names them: "mlp.experts.gate_up_proj"
    config.peft.exclude_modules = ()  # of those, names or endings, or one regex
    config.peft.layers_to_transform = ()  # numbers of the layers; empty: all
    config.peft.layers_pattern = ()  # the list of modules that those number; empty: any
    config.peft.rank_pattern = ()  # ((name ending or regex, rank), ...)
    config.peft.alpha_pattern = ()
    config.peft.use_rslora = False
    config.peft.loraplus_lr_ratio = 1.0  # learning rate of B over that of A
    config.peft.init_lora_weights = "default"  # or gaussian, orthogonal, pissa, pissa_niter_<n>
    config.peft.lora_bias = False  # B has a bias
    config.peft.bias = "none"
    config.peft.modules_to_save = ()
    # Rows of the embedding to train, and of a tied head; else also (("embed_tokens", ids), ("lm_head", ids)).
    config.peft.trainable_token_indices = ()
    config.peft.also_train = ""  # regex over "<collection>/<path>" of further parameters
    config.peft.bottleneck_size = 64  # of the houlsby and pfeiffer adapters
    config.peft.bottleneck_activation = "relu"
    config.peft.adapter_path = ""  # a PEFT folder to go on from

    config.eval = ConfigDict()
    config.eval.eval_steps = 0  # 0: only before and after training
    config.eval.batch_size = 0  # 0: the size of a training micro-batch
    config.eval.early_stopping_patience = 0  # evaluations without a better metric; 0: off
    config.eval.metric_for_best_model = "eval_loss"  # decides when to stop early, and which checkpoint is exported
    config.eval.greater_is_better = False
    config.eval.forgetting = ()  # sources of plain text, whose loss is followed from the start; as data.eval
    config.eval.kl_tokens = 0  # answer tokens at which KL to the base is measured (4 bytes x vocabulary each, kept)
    config.eval.prompts = ""  # file of prompts answered at each evaluation; empty: from the held-out rows
    config.eval.num_samples = 3
    config.eval.max_new_tokens = 64
    config.eval.temperature = 0.0  # 0: greedy
    config.eval.top_k = 0
    config.eval.top_p = 1.0
    config.eval.repetition_penalty = 1.0

    config.checkpoint = ConfigDict()
    config.checkpoint.save_steps = 0  # 0: at evaluations and at the end
    config.checkpoint.save_total_limit = 2

    config.export = ConfigDict()
    config.export.enabled = True
    config.export.dtype = "bfloat16"
    config.export.merge = False  # fold a LoRA adapter into the weights
    config.export.text_only = False  # of a multimodal model, its language model alone
    config.export.merge_into = "dequantized"  # the base that a quantised one was trained as, or the original weights
    config.export.checkpoint = "best"

    config.mesh = ConfigDict()  # devices on each axis; one may be -1, the rest
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    config.mesh.context = 1
    config.mesh.expert = 1

    config.log = ConfigDict()
    config.log.tensorboard = True
    config.log.wandb_project = ""
    return config.lock()


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list)


def from_json(text: str) -> ConfigDict:
    """The config saved with a run. Fields that have come since take their defaults."""
    config = defaults()
    _update(config, json.loads(text), "")
    return config


def of_run(run_dir: str, settings: dict[str, Any] | None = None) -> ConfigDict:
    """The configuration saved with a run; what its relative paths named there is found from any working folder.

    Args:
      run_dir: the run's folder.
      settings: the configuration, where it is known from a checkpoint; else it is read from config.json.

    Raises:
      ConfigError: it isn't a run's folder, or its configuration can't be understood.
    """
    values = _read_settings(run_dir) if settings is None else settings
    there = paths.working_folder(run_dir)
    config = defaults()
    _update(config, paths.map_settings(values, lambda path: paths.found(path, there)), "")
    return config


def _read_settings(run_dir: str) -> dict[str, Any]:
    try:
        with fsspec.open(f"{run_dir}/config.json", "r", encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{run_dir}: no config.json that can be read, so not a run's folder ({reason})") from None
    except ValueError as error:
        raise ConfigError(f"{run_dir}/config.json is not JSON ({error}): restore it") from None
    if not isinstance(values, dict) or not {"run_dir", "train"} <= values.keys():  # a model's, for one
        raise ConfigError(f"{run_dir}/config.json is not the configuration of a run: give a run's folder")
    return values


def _update(config: ConfigDict, values: dict[str, Any], prefix: str) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in config:
            raise ConfigError(unknown_field(path, config, prefix))
        if isinstance(config[key], ConfigDict) and isinstance(value, dict) and len(config[key]):
            _update(config[key], value, path + ".")
        else:
            with config.ignore_type():
                config[key] = tuple(value) if isinstance(value, list) else value


def unknown_field(path: str, config: ConfigDict, prefix: str = "") -> str:
    """The message for a key that doesn't exist: what it is called here, or the nearest that does exist."""
    return no_field(path, field_names(config, prefix))


def no_field(path: str, fields: Sequence[str]) -> str:
    """The same, of these fields."""
    hint = nearest_field(path, fields)
    return f"config: there is no field {path!r}" + (f"; did you mean {hint}?" if hint else "")


def nearest_field(path: str, fields: Sequence[str]) -> str:
    """The field, quoted, that somebody may have meant; first by other trainers' names. "" if nothing is near."""
    group, _, leaf = path.rpartition(".")

    def likeness(name: str) -> float:
        """Of the last parts; the right group decides between equals."""
        group_there, _, leaf_there = name.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, leaf_there).ratio() + 0.01 * (group == group_there)

    best = max(fields, key=likeness, default="")
    known = leaf == best.rpartition(".")[2]  # in another group
    alias = ALIASES.get(path) or (not known and ALIASES.get(leaf.lower().replace("-", "_")))
    if alias:
        return repr(alias) if alias in fields else alias
    return repr(best) if best and likeness(best) >= 0.7 else ""


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        names += field_names(value, f"{prefix}{key}.") if nested and len(value) else [f"{prefix}{key}"]
    return names


def rows_per_step(config: ConfigDict) -> int:
    """Sequences in one optimizer step."""
    if config.train.batch_tokens:
        return config.train.batch_tokens // config.data.max_length
    return config.train.batch_size


def check(config: ConfigDict, *, num_devices: int) -> None:
    """Everything that can be known to be wrong before anything is read.

    Raises:
      ConfigError: names each field at fault and the remedy, all at once.
    """
    _check_fields(config)
    problems = []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    require(bool(config.run_dir.strip()), "run_dir is empty: give the folder that the run is kept in")
    problems += _numbers(config)
    for path, choices in CHOICES.items():
        group, field = path.split(".")
        require(config[group][field] in choices, f"{path}={config[group][field]!r}: choose one of {', '.join(choices)}")
    require(
        all(isinstance(name, str) and name.strip() for name in config.model.add_tokens),
        f"model.add_tokens={tuple(config.model.add_tokens)!r}: give the names of tokens, none of them blank",
    )
    require(bool(config.model.path), "model.path is empty: give a Hugging Face folder, a .gguf file or a hub id")
    require(len(config.data.train) > 0, "data.train is empty: name at least one file")
    length = config.data.max_length
    require(
        length > 0 and length % 128 == 0,
        f"data.max_length={length} is not a multiple of 128: use {max(128, round(length / 128) * 128)}",
    )
    rows, micro = rows_per_step(config), config.train.gradient_accumulation_steps
    require(rows >= 1, f"train.batch_tokens={config.train.batch_tokens} is less than one sequence of {length}")
    shape = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor", "context", "expert")}
    batch_shards = _batch_shards(shape, num_devices, require)
    if micro >= 1 and rows >= 1 and batch_shards:
        require(
            rows % micro == 0,
            f"train.batch_size={rows} is not divisible by train.gradient_accumulation_steps={micro}",
        )
        require(
            (rows // micro) % batch_shards == 0,
            f"a micro-batch of {rows // micro} sequences (train.batch_size={rows} over "
            f"train.gradient_accumulation_steps={micro}) does not divide over {batch_shards} devices "
            f"(mesh.data x mesh.fsdp): make train.batch_size a multiple of {micro * batch_shards}, or lower mesh.fsdp",
        )
    require(config.data.max_segments >= 2, "data.max_segments must be at least 2: the padding is a segment of its own")
    require(
        config.train.max_steps > 0 or config.train.num_train_epochs > 0,
        "set train.num_train_epochs or train.max_steps above 0",
    )
    require(
        not (config.peft.method in ("houlsby", "pfeiffer") and config.export.enabled and config.export.merge),
        f"peft.method={config.peft.method} can't be merged into the weights: leave export.merge out (the export is "
        "then a folder of the `adapters` library, which tools/generate.py and tools/serve.py read)",
    )
    require(
        config.peft.quantization == "none" or config.peft.method != "none",
        f"peft.quantization={config.peft.quantization} freezes the base: choose a peft.method to train beside it",
    )
    require(
        not (config.eval.early_stopping_patience and not config.eval.eval_steps),
        "eval.early_stopping_patience needs eval.eval_steps",
    )
    if problems:
        raise ConfigError("config: " + "; ".join(problems))


def _check_fields(config: ConfigDict) -> None:
    """Raises ConfigError where a `get_config` didn't start from `defaults()`."""
    there, wanted = field_names(config), field_names(defaults())
    known = {*there, *(name.rpartition(".")[0] for name in there)}  # model.template_kwargs, with something in it
    missing = [name for name in wanted if name not in known and name.partition(".")[0] not in there]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"config: {', '.join(missing[:3])}{more} are missing: get_config has to start from sftjax.config.defaults()"
        )
    for name in there:
        if name not in wanted and name.rpartition(".")[0] not in wanted:  # that of an empty group, such as no fields
            raise ConfigError(no_field(name, wanted))


def _numbers(config: ConfigDict, prefix: str = "") -> list[str]:
    """Of each number that can't be: the field, its value, and what it may be."""
    problems = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            problems += _numbers(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            interval = RANGES.get(path, "(-inf, inf)" if isinstance(value, float) else "")
            if interval and not _inside(value, interval):
                problems.append(f"{path}={value} is not in {interval}")
    return problems


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (
        value <= high if interval[-1] == "]" else value < high
    )


def _batch_shards(shape: dict[str, int], num_devices: int, require) -> int:
    """Devices over which rows are split; 0 when the mesh itself is wrong."""
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = 1
    for axis, size in shape.items():
        require(size == -1 or size >= 1, f"mesh.{axis}={size}: use -1 (the rest) or a positive number")
        fixed *= size if size > 0 else 1
    require(len(free) <= 1, f"only one mesh axis may be -1, not {', '.join(free)}")
    fits = num_devices % fixed == 0 if free else num_devices == fixed
    require(fits, f"the mesh {shape} does not cover {num_devices} devices exactly: set one axis to -1")
    if not fits or len(free) > 1 or fixed < 1:
        return 0
    shape = {axis: num_devices // fixed if size == -1 else size for axis, size in shape.items()}
    return shape["data"] * shape["fsdp"]
