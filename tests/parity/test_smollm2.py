"""The real SmolLM2-135M-Instruct against transformers, torch and peft: logits, scores, training steps, answers.

Needs the model and the conversations of the quickstart (`bash tools/quickstart.sh --setup_only`).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import loading, optim, program
from sftjax.data.encode import RowEncoder
from sftjax.data.sources import open_source
from sftjax.generate.sample import Generator
from sftjax.models import decoder
from sftjax.parallel import mesh as meshes
from sftjax.peft import lora, merge
from sftjax.peft.spec import AdapterSpec
from sftjax.score import score_samples
from sftjax.weights import export, hf, peft_format

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "quickstart"
MODEL, DATA = FOLDER / "SmolLM2-135M-Instruct", FOLDER / "chitchat" / "held_out.jsonl"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.nightly,
    pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="run tools/quickstart.sh --setup_only first"),
]
STEPS, LENGTH, LEARNING_RATE = 5, 256, 1e-4
PROMPTS, NEW_TOKENS, MARGIN = 6, 40, 1e-3


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def ours():
    mesh = meshes.make({"fsdp": 1}, jax.devices()[:1])
    return loading.load_model(str(MODEL), dtype="float32", mesh=mesh)


@pytest.fixture
def theirs(torch):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def samples(ours):
    source, encoder = open_source({"path": str(DATA)}), RowEncoder(ours.tokenizer)
    made = [sample for row in range(len(source)) for sample in encoder(source[row], row)]
    return [sample for sample in made if len(sample.tokens) <= 400][:50]


def logits_of(torch, ours, theirs, sample):
    """Of a sample: ours, and those of a transformers model, float64 `[1, L, V]`."""
    tokens = sample.tokens[None]
    positions = np.arange(tokens.size, dtype=np.int32)[None]
    hidden, _ = decoder.hidden_states(
        ours.config, ours.runtime, ours.variables, tokens, positions, np.ones_like(tokens)
    )
    logits = np.asarray(decoder.logits(ours.config, ours.runtime, ours.variables, hidden)).astype(np.float64)
    with torch.no_grad():
        return logits, theirs(torch.tensor(tokens.astype(np.int64))).logits.double().numpy()


@pytest.mark.xfail(
    reason="one of the texts is 1.11e-4 apart, of which transformers' own rounding is 0.92e-4", strict=False
)
def test_logits_agree(torch, ours, theirs, samples):
    for sample in samples[:4]:
        logits, expected = logits_of(torch, ours, theirs, sample)
        assert np.abs(logits - expected).max() <= 1e-4


def test_logits_are_as_exact_as_float32_gets(torch, ours, samples):
    """Against float64: one rounding to float32 anywhere in the 30 layers moves a logit by 2e-5."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64, attn_implementation="eager")
    for sample in samples[:8]:
        logits, expected = logits_of(torch, ours, exact, sample)
        assert np.abs(logits - expected).max() <= 5e-5


def token_loss(torch, model, sample):
    """Weighted sum of the loss of one sample, with nothing but torch's own functions."""
    ids = torch.tensor(sample.tokens.astype(np.int64))[None]
    logits = model(ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return (losses * torch.tensor(sample.weights[1:])).sum()


def test_scores_of_fifty_conversations_agree(torch, ours, theirs, samples):
    assert len(samples) == 50 and sum(np.count_nonzero(s.weights) for s in samples) > 4000
    scores = dict(score_samples(ours.config, ours.runtime, ours.variables, samples))
    for number, sample in enumerate(samples):
        with torch.no_grad():
            expected = token_loss(torch, theirs, sample).item()
        assert scores[number]["nll"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_five_steps_follow_torch(torch, ours, theirs, samples, tmp_path, method):
    batches = [samples[2 * step : 2 * step + 2] for step in range(STEPS)]
    spec = AdapterSpec(method=method, rank=16, alpha=32)
    variables = {"params": jax.tree.map(jnp.array, ours.variables["params"])}
    if method == "lora":
        variables["adapter"] = lora.init(jax.random.key(0), variables["params"], spec)
        peft_format.save_adapter(
            tmp_path, variables["adapter"], spec, ours.config, base_model=str(MODEL), layout="plain"
        )
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    theirs.train()

    optimizer, _ = optim.make_optimizer(
        learning_rate=LEARNING_RATE, total_steps=STEPS, schedule="constant", max_grad_norm=1.0
    )
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    built = program.build(
        ours.config,
        decoder.Runtime(compute_dtype="float32", mesh=ours.runtime.mesh),
        ours.runtime.mesh,
        abstract,
        optimizer,
        trainable_regex=lora.trainable_regex(spec),
        max_segments=2,
        seed=0,
    )
    state, frozen = built.init_state(variables)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    for batch in batches:
        batch = [_cut(sample) for sample in batch]
        state, figures = built.train_step(state, frozen, built.put(_arrays(batch), range(2), 2))
        weight = sum(float(sample.weights[1:].sum()) for sample in batch)
        loss = sum(token_loss(torch, theirs, sample) for sample in batch) / weight
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        assert float(figures["nll"] / figures["weight"]) == pytest.approx(loss.item(), abs=1e-4)


def _cut(sample):
    return dataclasses.replace(sample, tokens=sample.tokens[:LENGTH], weights=sample.weights[:LENGTH])


def _arrays(batch):
    rows = {name: np.zeros((1, len(batch), LENGTH), np.int32) for name in ("tokens", "targets", "positions")}
    weights, segments = np.zeros((1, len(batch), LENGTH), np.float32), np.full((1, len(batch), LENGTH), 2, np.int32)
    for row, sample in enumerate(batch):
        size = len(sample.tokens)
        rows["tokens"][0, row, :size] = sample.tokens
        rows["targets"][0, row, : size - 1] = sample.tokens[1:]
        rows["positions"][0, row] = np.concatenate([np.arange(size), np.arange(LENGTH - size)])
        weights[0, row, : size - 1] = sample.weights[1:]
        segments[0, row, :size] = 1
    return {**rows, "weights": weights, "segment_ids": segments}


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_exports_answer_as_before_the_export(torch, ours, samples, tmp_path, form):
    from transformers import AutoModelForCausalLM

    spec = AdapterSpec(method="lora", rank=8, alpha=16)
    adapter = lora.init(jax.random.key(1), ours.variables["params"], spec)
    leaves, structure = jax.tree.flatten_with_path(adapter)
    noisy = [
        0.02 * jax.random.normal(jax.random.key(i), leaf.shape) if path[-1].key == "lora_B" else leaf
        for i, (path, leaf) in enumerate(leaves)
    ]
    adapter = jax.tree.unflatten(structure, noisy)
    variables = {"params": ours.variables["params"], "adapter": adapter}
    prompts = [sample.tokens[: 30 + 5 * number].tolist() for number, sample in enumerate(samples[:PROMPTS])]
    before = Generator(ours.config, ours.runtime, variables, ours.tokenizer).generate(
        prompts, max_new_tokens=NEW_TOKENS
    )

    if form == "adapter":
        from peft import PeftModel

        peft_format.save_adapter(tmp_path, adapter, spec, ours.config, base_model=str(MODEL), layout="plain")
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path)
    else:
        params = merge.merge(variables["params"], adapter, dtype=jnp.float32)
        export.export_model(
            tmp_path,
            ours.config,
            params,
            dtype="float32",
            source=hf.open_model(str(MODEL)),
            tokenizer=ours.tokenizer.files(),
        )
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    changed = 0
    for prompt, output in zip(prompts, before, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        found = theirs.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
        answer, expected = list(output.tokens), found.sequences[0, len(prompt) :].tolist()
        for place, (got, want) in enumerate(zip(answer, expected, strict=False)):
            if got != want:  # only where the reference itself could go either way
                top = found.logits[place][0].topk(2).values
                assert top[0] - top[1] < MARGIN
                break
        else:
            assert len(answer) == len(expected)
        changed += answer != plain.generate(ids, **options)[0, len(prompt) :].tolist()
    assert changed  # or the adapter would not have been seen
