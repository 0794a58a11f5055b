"""Every kind of adapter folder that PEFT writes: how it is made, and what we make of it (the table of `test_peft.py`).

A kind is a dict of LoraConfig's fields, with a few words of our own:
  _refused    a regex: the folder isn't read, and the message says why
  _bases      the bases it is made on; else all of BASES
  _grow       rows that `resize_token_embeddings` adds before
  _merges     False: PEFT itself can't merge it
"""

from __future__ import annotations

import peft
import torch
import transformers

BASES = ("llama", "qwen2", "gemma", "phi3")
TIED = ("qwen2", "gemma")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attention_dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES, tie_word_embeddings=False),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **_MOE, shared_expert_intermediate_size=40, mlp_only_layers=[1]
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **_MOE, head_dim=16),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
}
QV = dict(target_modules=["q_proj", "v_proj"])
QKV = {"phi3": ["qkv_proj"]}  # what q_proj and v_proj are called elsewhere
CHANGES = "changes the base"
ROWS = [3, 17, 95]
KINDS: dict[str, dict] = {
    "lora": QV,
    "all_linear": dict(target_modules="all-linear"),
    "all_linear_rslora": dict(target_modules="all-linear", use_rslora=True),
    "mlp": dict(target_modules=["down_proj", "up_proj", "gate_up_proj"]),
    "gaussian": QV | dict(init_lora_weights="gaussian"),
    "random": QV | dict(init_lora_weights=False),
    "orthogonal": QV | dict(init_lora_weights="orthogonal"),
    "eva": QV | dict(init_lora_weights="eva"),
    "mica": QV | dict(init_lora_weights="mica"),
    "rslora": QV | dict(use_rslora=True),
    "alpha_of_a_fraction": QV | dict(lora_alpha=3, r=7),
    "dora": QV | dict(use_dora=True),
    "dora_rslora": dict(target_modules="all-linear", use_dora=True, use_rslora=True),
    "rank_pattern": QV | dict(rank_pattern={"layers.1.self_attn.(q|qkv)_proj": 3, "v_proj": 6}),
    "alpha_pattern": QV | dict(alpha_pattern={r"layers\.[02]\.self_attn\.\w+_proj": 5}, use_rslora=True),
    "both_patterns": QV | dict(rank_pattern={"model.layers.0.*": 2}, alpha_pattern={"^model.layers.0.*": 9}),
    "some_layers": QV | dict(layers_to_transform=[0, 2]),
    "one_layer": QV | dict(layers_to_transform=1, layers_pattern="layers"),
    "regex": dict(target_modules=r".*\.(0|2)\.self_attn\.(q_proj|o_proj|qkv_proj)"),
    "excluded": dict(target_modules="all-linear", exclude_modules=["down_proj", "layers.1.self_attn.o_proj"]),
    "excluded_regex": dict(target_modules=["o_proj", "down_proj"], exclude_modules=r".*layers\.1\..*"),
    "dropout": QV | dict(lora_dropout=0.1),
    "fan_in_fan_out": QV | dict(fan_in_fan_out=True),
    "lora_bias": QV | dict(lora_bias=True, _merges=False, _bases=("llama", "gemma", "phi3")),
    "lora_bias_on_biases": QV | dict(lora_bias=True, _bases=("qwen2",)),
    "bias_lora_only": QV | dict(bias="lora_only", _bases=("qwen2",)),
    "bias_all": QV | dict(bias="all", _bases=("qwen2",)),
    "norms_saved": QV | dict(modules_to_save=["norm"]),
    "block_saved": QV | dict(modules_to_save=["mlp"]),
    "embedding_saved": QV | dict(modules_to_save=["embed_tokens"]),
    "head_saved": QV | dict(modules_to_save=["lm_head"]),
    "both_saved": QV | dict(modules_to_save=["embed_tokens", "lm_head"]),
    "tied_saved": QV | dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True, _bases=TIED),
    "tied_head_saved": QV | dict(modules_to_save=["lm_head"], ensure_weight_tying=True, _bases=TIED),
    "embedding_lora": dict(target_modules=["embed_tokens", "o_proj"]),
    "head_lora": dict(target_modules=["lm_head", "o_proj"]),
    "embedding_and_head_lora": dict(target_modules=["embed_tokens", "lm_head", "o_proj"], use_rslora=True),
    "embedding_dora": dict(target_modules=["embed_tokens", "o_proj"], use_dora=True),
    "head_dora": dict(target_modules=["lm_head", "o_proj"], use_dora=True),
    "tied_lora": dict(target_modules=["embed_tokens", "o_proj"], ensure_weight_tying=True, _bases=TIED),
    "head_lora_bias": dict(target_modules=["lm_head"], lora_bias=True, _merges=False),
    "rows": QV | dict(trainable_token_indices=ROWS),
    "rows_by_name": QV | dict(trainable_token_indices={"model.embed_tokens": ROWS}),
    "rows_of_both": QV | dict(trainable_token_indices={"embed_tokens": ROWS, "lm_head": [5, 6]}),
    "rows_of_the_head": QV | dict(trainable_token_indices={"lm_head": [5, 6]}),
    "grown": QV | dict(_grow=7),
    "grown_saved": QV | dict(_grow=7, modules_to_save=["embed_tokens", "lm_head"]),
    "grown_embedding_saved": QV | dict(_grow=7, modules_to_save=["embed_tokens"]),
    "grown_tied": QV | dict(_grow=7, modules_to_save=["embed_tokens"], ensure_weight_tying=True, _bases=TIED),
    "grown_rows": QV | dict(_grow=3, trainable_token_indices=[96, 97, 98]),
    # untied: PEFT doesn't write the rows that the head was grown by
    "grown_embedding_lora": dict(_grow=7, target_modules=["embed_tokens", "o_proj"], _bases=TIED),
    "parameters": dict(target_parameters=["self_attn.o_proj.weight"], target_modules=[]),
    "compiled": QV | dict(_compiled=True),
    "pickled": QV | dict(_pickled=True, _refused="is a pickle.*torch.load"),
    "pissa": QV | dict(init_lora_weights="pissa", _refused=CHANGES),
    "pissa_converted": QV | dict(init_lora_weights="pissa", _converted=True),
    "pissa_niter": QV | dict(init_lora_weights="pissa_niter_4", _refused=CHANGES),
    "olora": QV | dict(init_lora_weights="olora", _refused=CHANGES),
    "replicated_layers": QV | dict(layer_replication=[[0, 2], [1, 3]], _refused="layer_replication", _bases=("llama",)),
    "alora": QV | dict(alora_invocation_tokens=[5, 6], _refused="alora_invocation_tokens"),
    "velora": QV | dict(velora_config=dict(), _refused="velora_config", _bases=("llama",)),
    "kasa": QV | dict(kasa_config=dict(), _refused="kasa_config", _bases=("llama",)),
}
# On experts; and what PEFT makes of "all-linear" there: parameters and the router.
MIXTURE_KINDS: dict[str, dict] = {
    "attention": dict(target_modules=["q_proj", "o_proj"]),
    "all_linear": dict(target_modules="all-linear"),
    "experts": dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "gate_up": dict(target_modules=[], target_parameters=["experts.gate_up_proj"]),
    "down_rslora": dict(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"], use_rslora=True),
    "expert_patterns": dict(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"layers.1.mlp.experts.gate_up_proj": 2, "down_proj": 6},
        alpha_pattern={"layers.0.mlp.experts.down_proj": 5},
    ),
    "router": dict(target_modules=["q_proj"], target_parameters=["gate.weight", "router.weight"]),
    "experts_saved": dict(target_modules=["q_proj"], modules_to_save=["experts"]),
    "router_saved": dict(target_modules=["q_proj"], modules_to_save=["gate", "router"]),
    "embedding_lora": dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
}
# Other methods, made as they are by default: none of them is LoRA.
OTHER_METHODS = {
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
}


def make_base(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _scatter(model.named_parameters())
    return model.eval()


def _scatter(parameters) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)


def kinds_of(family: str) -> dict[str, dict]:
    """The kinds that are made on a base."""
    table = MIXTURE_KINDS if family in MIXTURES else KINDS
    return {name: kind for name, kind in table.items() if family in kind.get("_bases", (family,))}


def make_adapter(folder, family: str, kind: dict):
    """Saves base and adapter, both random in every part; returns PEFT's model."""
    words = {name: value for name, value in kind.items() if name.startswith("_")}
    settings = {name: value for name, value in kind.items() if not name.startswith("_")}
    if family in QKV and settings.get("target_modules") == QV["target_modules"]:
        settings["target_modules"] = QKV[family]
    for name, value in (("velora_config", "VeloraConfig"), ("kasa_config", "KasaConfig")):
        if name in settings:
            settings[name] = getattr(peft.tuners.lora.config, value)(**settings[name])
    make_base(family).save_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(2)
    if "_grow" in words:
        model.resize_token_embeddings(SIZES["vocab_size"] + words["_grow"], mean_resizing=False)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings)
    wrapped = peft.get_peft_model(model, config).eval()
    options = {}
    if "_converted" in words:
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(folder / "initial")
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        options["path_initial_model_for_weight_conversion"] = str(folder / "initial")
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    _save(wrapped, folder / "adapter", words, options)
    return wrapped


def _save(wrapped, folder, words, options) -> None:
    wrapped.save_pretrained(folder, **options)
    path = folder / "adapter_model.safetensors"
    if "_compiled" in words:  # what saving a model under torch.compile leaves in names
        from safetensors.torch import load_file, save_file

        prefix = "base_model.model."
        tensors = {prefix + "_orig_mod." + name.removeprefix(prefix): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if "_pickled" in words:
        from safetensors.torch import load_file

        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
