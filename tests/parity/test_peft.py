"""PEFT folders in and out, against peft itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from sftjax import optim, tree  # noqa: E402
from sftjax.models import decoder  # noqa: E402
from sftjax.peft import lora, merge  # noqa: E402
from sftjax.peft.spec import AdapterSpec  # noqa: E402
from sftjax.weights import hf, peft_format  # noqa: E402
from tests.parity import tiny_models as tiny  # noqa: E402

VARIANTS = {
    "lora": dict(),
    "all_linear": dict(target_modules="all-linear"),
    "rslora": dict(use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": dict(use_dora=True, target_modules=["q_proj", "v_proj", "up_proj"]),
    "patterns": dict(
        target_modules=["q_proj", "k_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3, "k_proj": 6},
        alpha_pattern={r"layers\.[02]\.self_attn\.q_proj": 5},
    ),
    "some_layers": dict(target_modules=["v_proj"], layers_to_transform=[1]),
    "regex": dict(target_modules=r".*\.(0|2)\.mlp\.(gate|up)_proj"),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "bias": dict(target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "bias_all": dict(target_modules=["q_proj", "v_proj"], bias="all"),
}
CASES = [("llama", name) for name in VARIANTS if not name.startswith("bias")] + [
    ("qwen2", "lora"),
    ("qwen2", "dora"),
    ("qwen2", "bias"),
    ("qwen2", "bias_all"),
    ("gemma", "all_linear"),
    ("gemma", "dora"),
]


def make_peft(model, seed: int = 1, **settings):
    """A PEFT model whose adapter is random in every part."""
    torch.manual_seed(seed)
    settings.setdefault("target_modules", ["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", lora_dropout=0.0, **settings)
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped.eval()


@pytest.fixture
def folders(tmp_path):
    """(base folder, adapter folder, peft model) for a family and a variant."""

    def make(family, **settings):
        model = tiny.make(family)
        model.save_pretrained(tmp_path / "base")
        wrapped = make_peft(model, **settings)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", wrapped

    return make


def load_base(path):
    files = hf.open_model(path)
    return files, hf.load_params(files, files.config, jnp.float32)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_merged_weights_equal_pefts(folders, family, variant, tmp_path):
    base, adapter_path, wrapped = folders(family, **VARIANTS[variant])
    files, params = load_base(base)
    adapter, _ = peft_format.load_adapter(adapter_path, files.config)
    merged = tree.flatten(merge.merge(params, adapter))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, expected = load_base(tmp_path / "merged")
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=2e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("family", "variant"), [*CASES, ("phi3", "fused"), ("phi3", "all_linear")])
def test_folder_survives_a_round_trip_to_the_byte(folders, family, variant, tmp_path):
    settings = VARIANTS.get(variant, dict(target_modules=["qkv_proj", "down_proj"]))
    base, adapter_path, _ = folders(family, **settings)
    files, _ = load_base(base)
    adapter, spec = peft_format.load_adapter(adapter_path, files.config)
    peft_format.save_adapter(tmp_path / "again", adapter, spec, files.config, layout=files.family.layout)
    before = load_file(adapter_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    raw = [path.joinpath("adapter_model.safetensors").read_bytes() for path in (adapter_path, tmp_path / "again")]
    assert raw[0] == raw[1]
    old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (adapter_path, tmp_path / "again"))
    assert old.keys() == new.keys()
    same_logits(base, adapter_path, tmp_path / "again")


def same_logits(base, *adapters, tolerance=0.0):
    """Loads each adapter with peft and compares logits with the first one's."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 49).reshape(2, 24)
    logits = []
    for path in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(model, path).eval()(tokens).logits.numpy())
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    "settings", [dict(init="pissa"), dict(init="pissa", use_rslora=True), dict(), dict(use_dora=True)]
)
def test_own_adapters_load_in_peft(tmp_path, family, settings):
    """An adapter made and changed here gives peft our logits, and our merged weights give them too."""
    model = tiny.make(family)
    model.save_pretrained(tmp_path / "base")
    files, params = load_base(tmp_path / "base")
    spec = AdapterSpec(rank=4, alpha=8, rank_pattern={"layers.1.mlp.down_proj": 2}, **settings)
    adapter = lora.init(jax.random.key(0), params, spec)
    rng = np.random.default_rng(0)
    change = {}
    for path, leaf in tree.flatten(adapter).items():
        if path.endswith(("/lora_A", "/lora_B", "/magnitude")):
            noise = 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)
            if path.endswith("mlp/down_proj/lora_A"):  # padding stays zero
                noise[1, 2:] = 0
            if path.endswith("mlp/down_proj/lora_B"):
                noise[1, :, 2:] = 0
            leaf = leaf + noise
        change[path] = leaf
    adapter = tree.unflatten(change)
    peft_format.save_adapter(tmp_path / "adapter", adapter, spec, files.config, layout=files.family.layout)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = wrapped(TOKENS).logits.numpy()
    close(our_logits(files.config, {"params": params, "adapter": adapter}), expected)
    close(our_logits(files.config, {"params": merge.merge(params, adapter)}), expected)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_and_gradients_equal_pefts(folders, family, variant):
    base, adapter_path, wrapped = folders(family, **VARIANTS[variant])
    files, params = load_base(base)
    adapter, spec = peft_format.load_adapter(adapter_path, files.config)
    output = wrapped(TOKENS, labels=TOKENS)
    output.loss.backward()
    adapter = jax.tree.map(jnp.asarray, adapter)
    close(our_logits(files.config, {"params": params, "adapter": adapter}), output.logits.detach().numpy())

    trainable, frozen = tree.partition({"params": params, "adapter": adapter}, lora.trainable_regex(spec))
    gradients = jax.grad(lambda t: our_loss(files.config, tree.merge(t, frozen)))(trainable)
    # peft's gradients, brought into our tree by the loader itself
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    wrapped.save_pretrained(adapter_path.with_name("gradients"))
    expected, _ = peft_format.load_adapter(adapter_path.with_name("gradients"), files.config)
    flat = tree.flatten(expected)
    for path, leaf in tree.flatten(gradients["adapter"]).items():
        close(leaf, flat[path], path)


def close(got, want, message=""):
    """Within 2e-5, relative to the largest number of the array."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(np.abs(want).max(), 1e-6), err_msg=message)


RUNTIME = decoder.Runtime(compute_dtype="float32", remat="none")
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def our_inputs():
    tokens = jnp.asarray(TOKENS.numpy(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return tokens, positions, jnp.ones_like(tokens)


def our_logits(config, variables):
    hidden, _ = decoder.hidden_states(config, RUNTIME, variables, *our_inputs())
    return decoder.logits(config, RUNTIME, variables, hidden)


def our_loss(config, variables):
    """The mean over all but the first token of each row, as transformers'."""
    tokens, _, _ = our_inputs()
    hidden, _ = decoder.hidden_states(config, RUNTIME, variables, *our_inputs())
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
    total, _ = decoder.token_loss(config, RUNTIME, variables, hidden, jnp.roll(tokens, -1, axis=1), weights)
    return total / weights.sum()


TRAINING = {
    "lora": (dict(), {}),
    "rslora": (dict(use_rslora=True), {}),
    "dora": (dict(use_dora=True), {}),
    "loraplus": (dict(), dict(loraplus_lr_ratio=16.0)),
    "pissa": (dict(init="pissa"), {}),
    "saved": (dict(modules_to_save=("lm_head",)), {}),
}


@pytest.mark.parametrize("variant", TRAINING)
def test_five_steps_follow_peft_and_torch(tmp_path, variant):
    """The loss curve of peft + torch's AdamW with warm-up, cosine, decay and clipping, to 1e-4."""
    settings, optimizer_settings = TRAINING[variant]
    model = tiny.make("llama")
    model.save_pretrained(tmp_path / "base")
    files, params = load_base(tmp_path / "base")
    spec = AdapterSpec(rank=4, alpha=8, **settings)
    adapter = lora.init(jax.random.key(0), params, spec)
    # peft starts from our A and B. PiSSA there changes the base; its own start must be ours up to signs.
    lora_settings = dict(use_rslora=spec.use_rslora, use_dora=spec.use_dora)
    if spec.pissa:
        lora_settings["init_lora_weights"] = "pissa"
    lora_settings["modules_to_save"] = list(spec.modules_to_save) or None
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            **lora_settings,
        ),
    ).train()
    if not spec.pissa:
        start = {name: torch.tensor(leaf) for name, leaf in peft_tensors(tmp_path, adapter, spec, files.config).items()}
        peft.set_peft_model_state_dict(wrapped, start)
    expected = torch_losses(wrapped, **optimizer_settings)
    got = our_losses(files.config, params, adapter, spec, **optimizer_settings)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert expected[0] - expected[-1] > 0.01


def peft_tensors(folder, adapter, spec, config):
    peft_format.save_adapter(folder / "start", adapter, spec, config, layout="plain")
    return load_file(folder / "start" / "adapter_model.safetensors")


def torch_losses(wrapped, loraplus_lr_ratio=1.0, steps=6):
    from transformers import get_cosine_schedule_with_warmup

    groups = {True: [], False: []}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            groups["lora_B" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [dict(params=groups[True], lr=5e-3 * loraplus_lr_ratio), dict(params=groups[False], lr=5e-3)], weight_decay=0.1
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, steps)
    losses = []
    for _ in range(steps):
        loss = wrapped(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def our_losses(config, params, adapter, spec, steps=6, **settings):
    optimizer, _ = optim.make_optimizer(
        learning_rate=5e-3, total_steps=steps, warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5, **settings
    )
    trainable, frozen = tree.partition({"params": params, "adapter": adapter}, lora.trainable_regex(spec))
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        loss, gradients = jax.value_and_grad(lambda t: our_loss(config, tree.merge(t, frozen)))(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optim.apply_updates(trainable, updates), state, loss

    losses = []
    for _ in range(steps):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embedding_trained_in_full(folders, family):
    """Tied: peft's copy of the embedding, with weight tying ensured, serves the head too."""
    settings = dict(modules_to_save=["embed_tokens"])
    if family == "qwen2":
        settings["ensure_weight_tying"] = True
    base, adapter_path, _ = folders(family, **settings)
    files, _ = load_base(base)
    adapter, spec = peft_format.load_adapter(adapter_path, files.config)
    again = adapter_path.with_name("again")
    peft_format.save_adapter(again, adapter, spec, files.config, layout="plain")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter_path, again))
    assert before.keys() == after.keys()
    same_logits(base, adapter_path, again)
