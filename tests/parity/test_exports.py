"""What is exported, in the programs that people load it with: transformers 5 and 4.57, and llama.cpp.

Each family's tiny model goes out through `convert` as a folder and as a GGUF file; each program is one process that
looks at all of them. `python tests/parity/test_exports.py` prints the table of docs/exports.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sftjax import convert  # noqa: E402
from sftjax.errors import ConfigError  # noqa: E402
from sftjax.weights import families, rules  # noqa: E402
from tests.data.tiny import CHATML, byte_level  # noqa: E402
from tests.golden import family_cases  # noqa: E402
from tests.parity import peer_transformers  # noqa: E402
from tests.weights import tiny  # noqa: E402

pytestmark = pytest.mark.parity
ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent

_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
CASES = {  # name: (case of family_cases, what is changed)
    **{name: (name, {}) for name in family_cases.CASES},
    # Phi-3's file has two sets of divisors; llama.cpp takes one by the context that it is opened with, 256 at least
    "phi3": ("phi3", dict(original_max_position_embeddings=256)),
    "phi4_mini": ("phi3", family_cases.CASES["phi4_mini"] | dict(original_max_position_embeddings=256)),
    "qwen2_moe, all layers": ("qwen2_moe", dict(mlp_only_layers=[])),
    "seed_oss, no output bias": ("seed_oss", dict(attention_out_bias=False)),
    "gpt_oss, plain rope": ("gpt_oss", dict(rope_parameters=dict(rope_type="default", rope_theta=15e4))),
    "mistral, no window, yarn": (
        "mistral", dict(sliding_window=None, rope_parameters=_YARN | dict(attention_factor=1.3, beta_fast=20.0))
    ),
    "qwen3, yarn with mscale": ("qwen3", dict(rope_parameters=_YARN | dict(mscale=0.7, mscale_all_dim=1.2))),
    "granite, biases, tied": ("granite", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "gemma3, every third layer": ("gemma3", dict(sliding_window_pattern=3)),
    "olmo2, tied": ("olmo2", dict(tie_word_embeddings=True)),
    # with an adapter of PEFT's own making folded in
    **{f"{name}, merged": (name, {}) for name in ("llama31", "qwen2", "gemma3")},
}  # fmt: skip
# refused with these words, since llama.cpp's code for the family computes something else
NOT_GGUF = {"llama_dynamic": "dynamic", "seed_oss": "o_bias", "qwen2_moe": "experts"}
# what llama.cpp itself does otherwise
LLAMA_CPP_DIFFERS = {"gpt_oss": "llama.cpp rounds the bounds of YaRN's ramp, which GPT-OSS doesn't"}
TEXTS = ["Hello, it's 12345 o'clock!\n\n  x = foo(1.5)\t# été\r\n 你好，世界 50% $3,000.00", "a<|im_end|>b"]
MESSAGES = [dict(role=role, content=text) for role, text in (("user", "Hi"), ("assistant", "Yes."), ("user", "x"))]
NAMED = {"default": CHATML, "tool_use": "T" + CHATML, "rag": "R" + CHATML}
LENGTHS = (7, 46, 200)  # the last beyond each window and pre-training length but Phi-3's
NO_WINDOW = ("mistral", "qwen2", "qwen2, merged")  # in llama.cpp: the file's context ends there


def make(name: str, folder: Path) -> Path:
    """A random model, its numbers exact in float16."""
    case, changes = CASES[name]
    raw = family_cases.raw_config(case) | dict(vocab_size=900, bos_token_id=0, eos_token_id=2, pad_token_id=0) | changes
    config = families.read_config(raw)
    table = rules.tensors(config, families.FAMILIES[families.family_of(raw)].layout)
    tensors = {}
    for tensor in table:
        values = family_cases.values(tensor.name, tensor.shape, config.norm_plus_one)
        small = 0.5 if len(tensor.shape) > 1 and "router" not in tensor.name and ".gate." not in tensor.name else 1.0
        tensors[tensor.name] = (small * values).astype(np.float16).astype(np.float32)
    tiny.write_model(folder, raw, tensors)
    byte_level(folder, template=[{"name": name, "template": text} for name, text in NAMED.items()])
    return folder


def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 900, length).tolist() for length in LENGTHS]


def run_peer(python: str, script: str, tasks: list[dict], out: Path) -> list[dict]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, str(PEERS / script), str(out)]
    options = dict(text=True, capture_output=True, env=environment, timeout=900)
    done = subprocess.run(command, input=json.dumps(tasks), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def make_adapter(base: Path, folder: Path) -> str:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return str(folder)


def export_all(place: Path) -> dict[str, str]:
    """Every case as it came, converted, and as a GGUF file; returns why there is none, by case."""
    refused = {}
    for number, name in enumerate(CASES):
        source = make(name, place / f"{number}-in")
        adapter = make_adapter(source, place / f"{number}-adapter") if name.endswith("merged") else None
        convert.convert(str(source), str(place / f"{number}-out"), adapter=adapter)
        try:
            convert.convert(str(source), str(place / f"{number}.gguf"), adapter=adapter, dtype="float16")
        except ConfigError as error:
            refused[name] = str(error)
    return refused


def task(folder: Path) -> dict:
    return dict(folder=str(folder), prompts=prompts(), texts=TEXTS, messages=MESSAGES, templates=["rag", "tool_use"])


def in_transformers_5(place: Path, kind: str) -> dict[str, dict]:
    found = {}
    for number, name in enumerate(CASES):
        adapter = str(place / f"{number}-adapter") if kind == "in" and name.endswith("merged") else None
        found[name] = peer_transformers.look(task(place / f"{number}-{kind}") | dict(adapter=adapter))
    return found


def transformers_4() -> str:
    """The Python of the environment that tools/test.sh --parity makes for it."""
    python = sorted(ROOT.glob(".venv-*-tf4/bin/python"))
    if not python:
        pytest.skip("no environment with transformers 4 (bash tools/test.sh --parity makes it)")
    return str(python[0])


def in_transformers_4(place: Path) -> dict[str, dict]:
    tasks = [task(place / f"{number}-out") for number, _ in enumerate(CASES)]
    results = run_peer(transformers_4(), "peer_transformers.py", tasks, place / "transformers-4.json")
    return dict(zip(CASES, results, strict=True))


def in_llama_cpp(place: Path, refused: dict[str, str]) -> dict[str, dict]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is part of the extra `parity`")
    files = {name: place / f"{number}.gguf" for number, name in enumerate(CASES) if name not in refused}
    tasks = [task(place) | dict(gguf=str(file), context=256) for file in files.values()]
    for name, one in zip(files, tasks, strict=True):
        one["prompts"] = one["prompts"][:2] if name in NO_WINDOW else one["prompts"]
    return dict(zip(files, run_peer(sys.executable, "peer_llama_cpp.py", tasks, place / "llama.json"), strict=True))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    place = tmp_path_factory.mktemp("exports")
    return place, export_all(place)


@pytest.fixture(scope="module")
def expected(exports):
    """The models as they came, in the transformers that runs this."""
    return in_transformers_5(exports[0], "in")


def difference(found: dict, wanted: dict) -> float:
    """The largest difference of logits; infinite where ids, chat text or stop tokens aren't equal."""
    if any(found[key] != wanted[key] for key in ("ids", "chat", "stops")):
        return float("inf")
    return float(np.abs(np.array(found["logits"]) - np.array(wanted["logits"])).max())


def too_far(results: dict[str, dict], expected: dict[str, dict], measure, limit: float) -> dict[str, str]:
    """The models that don't load or differ by more."""
    figures = {name: found.get("error") or measure(found, expected[name]) for name, found in results.items()}
    return {name: figure for name, figure in figures.items() if isinstance(figure, str) or figure > limit}


def test_transformers_5_loads_every_export(exports, expected):
    assert all(set(found["chat"]) == set(NAMED) for found in expected.values())
    results = in_transformers_5(exports[0], "out")
    assert not too_far(results, expected, difference, 1e-5)
    plain = {name: found for name, found in results.items() if not name.endswith("merged")}
    assert not too_far(plain, expected, difference, 0.0)


def test_transformers_4_loads_every_export(exports, expected):
    results = in_transformers_4(exports[0])
    assert not too_far(results, expected, difference, 1e-4)
    assert all(found["version"].startswith("4.57") for found in results.values())


def top_difference(found: dict, wanted: dict) -> float:
    """Largest difference of the log-probabilities of llama.cpp's five most likely tokens; see `difference`."""
    if found["ids"] != wanted["ids"] or found["chat"] != wanted["chat"]["default"]:
        return float("inf")
    differences = []
    for top, logits in zip(found["top"], wanted["logits"], strict=False):
        theirs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
        differences += [abs(value - float(theirs[number])) for number, value in top]
    return max(differences)


def test_llama_cpp_loads_every_file(exports, expected):
    place, refused = exports
    assert set(refused) == set(NOT_GGUF)
    assert all(word in refused[name] for name, word in NOT_GGUF.items())
    differ = too_far(in_llama_cpp(place, refused), expected, top_difference, 0.02)
    assert {name for name in differ if name not in LLAMA_CPP_DIFFERS} == set(), differ
    assert not any(isinstance(figure, str) for figure in differ.values())


def table() -> None:
    """Prints the figures of docs/exports.md."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        refused = export_all(place)
        wanted, five, four = in_transformers_5(place, "in"), in_transformers_5(place, "out"), in_transformers_4(place)
        llama = in_llama_cpp(place, refused)
    print("| model | transformers 5 | transformers 4.57 | llama.cpp, float16 |\n|---|---|---|---|")
    for name in CASES:
        cells = [one[name].get("error") or f"{difference(one[name], wanted[name]):.1g}" for one in (five, four)]
        last = llama.get(name, {"error": "refused"})
        cells.append(last.get("error") or f"{top_difference(last, wanted[name]):.1g}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    table()
