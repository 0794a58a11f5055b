"""What a configuration means: adapter settings, batches, an adapter to go on from."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sftjax import config as config_lib
from sftjax import job, job_data
from sftjax.errors import ConfigError
from sftjax.models import decoder
from sftjax.models.config import LayerSpec, ModelConfig, Rope
from sftjax.parallel import mesh as meshes
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import peft_format

MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=Rope(10000.0, 16)),) * 2,
    max_position=512,
    norm_eps=1e-5,
    tie_word_embeddings=True,
)


def test_every_field_of_an_adapter_can_be_set():
    config = config_lib.defaults()
    peft = {
        "method": "dora",
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "target_modules": ("q_proj", "v_proj"),
        "exclude_modules": ("layers.1.self_attn.v_proj",),
        "target_parameters": ("mlp.experts.down_proj",),
        "layers_to_transform": (1,),
        "layers_pattern": ("layers",),
        "rank_pattern": (("q_proj", 2),),
        "alpha_pattern": (("q_proj", 3),),
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "bias": "lora_only",
        "modules_to_save": ("embed_tokens",),
        "trainable_token_indices": (("lm_head", (1, 2)),),
        "also_train": "params/norm/weight",
        "bottleneck_size": 7,
        "bottleneck_activation": "gelu",
    }
    for name, value in peft.items():
        config.peft[name] = value
    spec, plain = job.adapter_spec(config, model=MODEL, grows=False), AdapterSpec()
    unchanged = [
        field.name
        for field in dataclasses.fields(AdapterSpec)
        if field.name != "method" and getattr(spec, field.name) == getattr(plain, field.name)
    ]
    assert unchanged == ["lora_bias"]  # which PEFT has beside neither DoRA nor another start
    config.peft.method, config.peft.init_lora_weights, config.peft.lora_bias = "lora", "default", True
    assert job.adapter_spec(config, model=MODEL, grows=False).lora_bias
    config.peft.trainable_token_indices = ()  # the head of this model is tied
    spec = job.adapter_spec(config, model=MODEL, grows=False)
    abstract = jax.eval_shape(
        lambda params: job.new_adapter({"params": params}, spec, 0), decoder.abstract_params(MODEL)
    )
    assert set(abstract["layers_0"]["0"]["self_attn"]) == {"q_proj"}  # v_proj of layer 1 is left out, 0 isn't asked for


def test_what_a_step_donates_is_not_what_pissa_keeps():
    spec = AdapterSpec(rank=4, init="pissa")
    adapter = job.new_adapter({"params": decoder.init_params(jax.random.key(0), MODEL)}, spec, 0)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(adapter)]
    assert len(set(buffers)) == len(buffers)


def test_new_tokens_are_trained_beside_an_adapter():
    config = config_lib.defaults()
    assert job.adapter_spec(config, model=MODEL, grows=True).modules_to_save == ()  # everything is trained anyway
    config.peft.method = "lora"
    assert job.adapter_spec(config, model=MODEL, grows=True).modules_to_save == ("embed_tokens",)
    untied = MODEL.replace(tie_word_embeddings=False)
    assert job.adapter_spec(config, model=untied, grows=True).modules_to_save == ("embed_tokens", "lm_head")


def test_schedule_and_decay_are_as_the_settings_say():
    config = config_lib.defaults()
    config.train.lr_scheduler_type, config.train.learning_rate = "wsd", 1.0
    config.train.warmup_ratio, config.train.min_lr_ratio, config.train.decay_ratio = 0.0, 0.25, 0.5
    config.train.weight_decay, config.train.weight_decay_regex = 0.1, "params/norm/.*"
    config.train.optim, config.train.max_grad_norm, config.train.adam_beta1 = "sgd", 0.0, 0.0
    mesh = meshes.make({"fsdp": 1}, jax.devices()[:1])
    spec = job.adapter_spec(config, model=MODEL, grows=False)
    program, schedule = job.build_program(config, MODEL, spec, mesh, total_steps=100)
    assert [round(float(schedule(step)), 3) for step in (0, 50, 75, 100)] == [1.0, 1.0, 0.625, 0.25]
    weights = {"params": {"norm": {"weight": np.ones(64)}, "embed_tokens": {"weight": np.ones((96, 64))}}}
    zeros = jax.tree.map(np.zeros_like, weights)
    updates, _ = program.optimizer.update(zeros, program.optimizer.init(weights), weights)
    assert np.all(np.asarray(updates["params"]["embed_tokens"]["weight"]) == 0)
    np.testing.assert_allclose(updates["params"]["norm"]["weight"], -0.1, rtol=1e-6)


def test_flat_rows_follow_the_devices_and_hold_as_many_samples_as_the_rows_they_stand_for():
    config = config_lib.defaults()
    config.data.packing, config.data.max_segments = "padding_free", 5
    config.train.batch_size, config.train.gradient_accumulation_steps = 16, 2
    mesh = meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
    options = job_data.batching_options(config, mesh)
    assert (options["batch_size"], options["flat_rows"], options["fill"]) == (8, 4, "sequences")
    config.train.batch_tokens = 16 * config.data.max_length
    options = job_data.batching_options(config, mesh)
    assert (options["fill"], options["max_segments"]) == ("tokens", 2 * 4 + 1)  # two rows of four samples, and the tail
    spec = job.adapter_spec(config, model=MODEL, grows=False)
    program, _ = job.build_program(config, MODEL, spec, mesh, total_steps=100)
    assert program.runtime.max_segments == options["max_segments"]  # without it, no kernel for packed rows on a GPU


def test_an_adapter_that_is_not_what_the_settings_say_is_refused():
    config = config_lib.defaults()
    config.peft.method, config.peft.r = "lora", 4
    spec = job.adapter_spec(config, model=MODEL, grows=False)
    params = {"params": decoder.init_params(jax.random.key(0), MODEL)}
    adapter = job.new_adapter(params, spec, 0)
    job.check_adapter(adapter, adapter, "there")
    other = job.new_adapter(params, spec.replace(rank=8), 0)
    message = r"there: its .*/lora_A is \(2, 8, 128\), where the peft settings make it \(2, 4, 128\)"
    with pytest.raises(ConfigError, match=message):
        job.check_adapter(other, adapter, "there")
    fewer = job.new_adapter(params, spec.replace(target_modules=("q_proj",)), 0)
    with pytest.raises(ConfigError, match="is missing"):
        job.check_adapter(fewer, adapter, "there")
    assert np.all(np.asarray(adapter["layers_0"]["0"]["mlp"]["up_proj"]["lora_B"]) == 0)


def test_an_adapter_to_go_on_from_keeps_its_ranks_and_scales(tmp_path):
    """What config.json records is what the run does."""
    params, spec = decoder.init_params(jax.random.key(0), MODEL), AdapterSpec(rank=4, alpha=8)
    adapter = job.new_adapter({"params": params}, spec, 0)
    peft_format.save_adapter(tmp_path, adapter, spec, MODEL, layout="plain")
    for same in (spec, AdapterSpec(rank=4, alpha=4, use_rslora=True)):
        job.check_scales(str(tmp_path), same, MODEL)
    with pytest.raises(
        ConfigError, match=r"times 2; .* times 4: set peft.r=4 peft.lora_alpha=8.0 peft.use_rslora=False"
    ):
        job.check_scales(str(tmp_path), AdapterSpec(rank=4, alpha=16), MODEL)
    with pytest.raises(ConfigError, match=r"has rank 4 .* rank 8"):
        job.check_scales(str(tmp_path), AdapterSpec(rank=8, alpha=16), MODEL)
