"""Generation is the model's own next-token rule, whatever the batch; (families: tests/models/test_families.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.errors import DataError
from sftjax.generate import engine, sample
from sftjax.models import decoder
from sftjax.models.config import Experts, LayerSpec, ModelConfig, Rope
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition

ROPE = Rope(10_000.0, 16)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=ROPE), LayerSpec(window=8, rope=ROPE, experts=Experts(4, 2, 32, True))),
    max_position=512,
    norm_eps=1e-5,
    tie_word_embeddings=False,
)
RUNTIME = decoder.Runtime(compute_dtype="float32")


class Letters:
    """A tokenizer of 64 characters."""

    renderer, prefix_ids, stop_ids = None, (), (0,)
    alphabet = "\n" + "".join(chr(code) for code in range(65, 128))

    def encode(self, text):
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids, *, skip_special=False):
        return "".join(self.alphabet[number] for number in ids)


@pytest.fixture(scope="module")
def variables():
    params = jax.jit(decoder.init_params, static_argnums=1)(jax.random.key(0), CONFIG)
    params = tree.map_paths(lambda path, leaf: leaf if "norm" in path else leaf * 10, params)
    return {"params": params}


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(0)
    return [random.integers(1, 64, length).tolist() for length in (3, 40, 1, 17, 66, 8, 25)]


@pytest.fixture(scope="module")
def generator(variables):
    return sample.Generator(CONFIG, RUNTIME, variables, Letters(), batch_size=4)


def next_logits(variables, ids):
    """By a plain forward pass over everything so far."""
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    return _forward(variables, tokens)[0, len(ids) - 1]


@jax.jit
def _forward(variables, tokens):
    positions = jnp.arange(128)[None]
    hidden, _ = decoder.hidden_states(CONFIG, RUNTIME, variables, tokens, positions, jnp.ones_like(positions))
    return decoder.logits(CONFIG, RUNTIME, variables, hidden)


def test_greedy_is_the_argmax_of_plain_forward_passes(generator, variables, prompts):
    outputs = generator.generate(prompts, max_new_tokens=24, stop_ids=())
    assert [output.prompt for output in outputs] == list(range(len(prompts)))
    for output, prompt in zip(outputs, prompts, strict=True):
        ids = list(prompt)
        for token, logprob in zip(output.tokens, output.logprobs, strict=True):
            logits = next_logits(variables, ids)
            assert token == logits.argmax()
            assert logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token]), abs=2e-5)
            ids.append(token)
        assert output.finish_reason == "length" and len(output.tokens) == 24 and output.prompt_tokens == len(prompt)


def test_answers_depend_on_their_seed_and_not_on_the_batch(generator, variables, prompts):
    settings = dict(temperature=1.0, top_p=0.9, max_new_tokens=12, n=2)
    one = generator.generate(prompts, seed=5, **settings)
    wide = sample.generate(CONFIG, RUNTIME, variables, Letters(), prompts, batch_size=64, seed=5, **settings)
    other = generator.generate(prompts, seed=6, **settings)
    assert [output.tokens for output in one] == [output.tokens for output in wide]
    assert [output.tokens for output in one] != [output.tokens for output in other]
    assert one[0].tokens != one[1].tokens  # two answers to one prompt


def test_stop_tokens_end_an_answer_and_leave_its_text(generator, prompts):
    free = generator.generate(prompts, max_new_tokens=20, stop_ids=())
    for output in free:
        stop = output.tokens[6]
        (found,) = generator.generate([prompts[output.prompt]], max_new_tokens=20, stop_ids=(stop,))
        upto = output.tokens.index(stop)
        assert found.tokens == output.tokens[: upto + 1] and found.finish_reason == "stop"
        assert found.text == Letters().decode(output.tokens[:upto])


def test_stop_strings_cut_the_text_where_they_start(generator, prompts):
    (free,) = generator.generate(prompts[:1], max_new_tokens=20, stop_ids=())
    stop = free.text[5:8]
    (found,) = generator.generate(prompts[:1], max_new_tokens=20, stop_ids=(), stop=[stop, "never"])
    assert found.text == free.text[: free.text.index(stop)]
    assert found.finish_reason == "stop" and len(found.tokens) < 20


def test_streamed_pieces_make_the_text(variables, prompts):
    pieces: dict[int, str] = {}
    generator = sample.Generator(CONFIG, RUNTIME, variables, Letters(), batch_size=2, steps=2)

    def on_text(number, text):
        pieces[number] = pieces.get(number, "") + text

    outputs = generator.generate(prompts[:3], max_new_tokens=15, stop=["zzz"], on_text=on_text)
    assert pieces == {number: output.text for number, output in enumerate(outputs) if output.text}


def test_adapters_and_a_mesh_are_used(variables, prompts):
    shape = variables["params"]["layers_0"]["0"]["self_attn"]["q_proj"]["weight"].shape
    adapter = {
        "lora_A": jax.random.normal(jax.random.key(1), (1, 4, shape[2])),
        "lora_B": jax.random.normal(jax.random.key(2), (1, shape[1], 4)),
        "scale": jnp.full((1,), 0.1),
    }
    variables = variables | {"adapter": {"layers_0": {"0": {"self_attn": {"q_proj": adapter}}}}}
    merged = jax.tree.map(lambda leaf: leaf, variables["params"])
    delta = 0.1 * jnp.einsum("lor,lri->loi", adapter["lora_B"], adapter["lora_A"], precision="highest")
    merged["layers_0"]["0"]["self_attn"]["q_proj"]["weight"] += delta
    settings = dict(max_new_tokens=10, batch_size=8)
    plain = sample.generate(CONFIG, RUNTIME, {"params": merged}, Letters(), prompts, **settings)
    beside = sample.generate(CONFIG, RUNTIME, variables, Letters(), prompts, **settings)
    mesh = meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(variables, partition.shardings(variables, mesh))
    spread = sample.generate(CONFIG, RUNTIME.replace(mesh=mesh), placed, Letters(), prompts, **settings)
    for outputs in (beside, spread):
        assert [output.tokens for output in outputs] == [output.tokens for output in plain]


def test_weights_kept_as_bits_are_the_same_weights(variables):
    """A CPU keeps the layers' bfloat16 so; once done it isn't done again."""
    runtime = RUNTIME.replace(compute_dtype="bfloat16")
    packed = sample.in_compute_dtype(variables, "bfloat16")
    again = sample.in_compute_dtype(packed, "bfloat16")
    kept, kept_again = tree.flatten(packed["params"]), tree.flatten(again["params"])
    assert kept["layers_0/0/self_attn/q_proj/weight"].dtype == jnp.uint16
    assert {path: leaf.dtype for path, leaf in kept.items()} == {path: leaf.dtype for path, leaf in kept_again.items()}
    plain = tree.map_paths(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if kept[path].dtype != jnp.float32 else leaf, variables["params"]
    )
    tokens, lengths = np.arange(8)[None], np.array([8])
    (_, one), (_, two) = (
        engine.prefill(CONFIG, runtime, {"params": params}, tokens, lengths) for params in (plain, packed["params"])
    )
    np.testing.assert_allclose(one, two, atol=1e-2 * float(jnp.abs(one).max()))  # fused otherwise, rounded otherwise


def test_texts_and_messages_without_a_template_are_continued(generator):
    assert sample.encode_prompt(Letters(), "AB") == [1, 2]
    message = {"role": "user", "content": "AB"}
    one, two = generator.generate(["AB", [message]], max_new_tokens=3)
    assert one.tokens == two.tokens


def test_an_empty_prompt_is_refused(generator):
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generator.generate(["A", ""])


def test_no_tokens_asked_for():
    assert sample.Generator(CONFIG, RUNTIME, {"params": {}}).generate([[1]], max_new_tokens=0)[0].tokens == ()
