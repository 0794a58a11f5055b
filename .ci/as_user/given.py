"""What the pages take for granted: the files that they name, and which of their commands can't be run here.

A command that isn't named here is run as it stands on its page, in the environment that the page tells people to make.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

# No machine of CI's can run these. What is behind their `python` is still read by the program's own parser.
NOT_RUN = {
    r"^(srun|gcloud|xpk) |--coordinator=": "needs a cluster",
    r"PYTHON_WITH_TRL": "compares with another trainer, in its own environment",
    r"--config.model.path=gemma.gguf": "needs a model from a hub",
    r"tools/test.sh|\.ci/|^python -m pytest|make_families.py|tests/parity/": "the stages of .ci/run",
    r"SFTJAX_WHEELS=": "needs data sets that are packages of 100 MB and more",
}
# Minutes each; run with --nightly, and parsed otherwise.
NIGHTLY = {
    r"tools/plan.py .*--topology=v\d": "libtpu, and minutes of compiling",
    r"tools/(compare_methods|compare_data|improve).py": "several trainings of the real model",
    r"tools/profile_step.py": "minutes on the real model",
    r"measure_scale.py": "minutes",
    r"pip install .*(tpu|lm-eval|reasoning-gym)|tools/harness.py": "hundreds of MB of packages",
}
# The real model, but only a little of it; whatever else trains or answers does so with a tiny one.
SHORTER = (
    (r"tools/quickstart.sh(?!.*--setup_only)", "--config.train.max_steps=2 --config.eval.eval_steps=0"),
    (r"tools/quickstart.sh(?!.*--setup_only)", "--config.data.max_eval_rows=2 --config.eval.num_samples=1"),
    (r"tools/quickstart.sh(?!.*--setup_only)", "--config.eval.max_new_tokens=8"),
    (r"sftjax.main .*--config=", "--config.train.max_steps=2 --config.eval.max_new_tokens=4"),
    (r"sftjax.main .*--config=", "--config.data.max_length=256 --config.data.max_eval_rows=4"),
    (r"tools/evaluate.py|tools/synthesize.py rejection", "--max_new_tokens 8"),
    (r"tools/compare_methods.py|tools/compare_data.py", "--steps 1 --seeds 0 --eval_rows 2"),
    (r"tools/improve.py", "--seeds 0 --held_out 4 --first 8 --second 4 --n 2"),
)
WORDS = {  # what a reader puts in place of the page's capitals
    "DIR": "models/tiny",
    "DIR2": "models/tiny",
    "LARGER": "models/tiny",
    "RUN": "runs/smollm2_135m",
    "runs/NAME": "runs/smollm2_135m",
    "NAME": "export",
    "200000": "2000",
}


def why(command: str, table: dict[str, str]) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, command)), None)


def filled(command: str) -> str:
    """The command with a reader's own names in it, and only a few steps of what would be long."""
    command = re.sub(r"(?<![\w/])(runs/NAME|DIR2|DIR|LARGER|RUN|NAME|200000)(?![\w])", lambda m: WORDS[m[1]], command)
    for pattern, more in SHORTER:
        if re.search(pattern, command):
            command += f" {more}"
    return command


def write_files(folder: Path, example: str) -> None:
    """The files that the pages name: a reader's own data, all of it tiny."""
    row = json.loads(example)
    chats = []
    for number in range(40):
        messages = json.loads(json.dumps(row["messages"]).replace("2+2", f"{number}+2"))
        messages[-1]["content"] = f"{number + 2}, since {number} and two more make {number + 2} in all."
        chats.append({"messages": messages})
    sums = [{"question": f"What is {n} plus {n}?", "answer": f"Twice {n}. #### {2 * n}"} for n in range(12)]
    texts = [{"text": f"Passage {n}: the river runs past {n} mills and a bridge, then to the sea."} for n in range(40)]
    for name, rows in {
        "chats.jsonl": chats,
        "train.jsonl": chats,
        "held_out.jsonl": chats[:4],
        "prompts.jsonl": [{"prompt": f"What capital has {name}?"} for name in ("France", "Peru", "Japan", "Italy")],
        "gsm8k.jsonl": sums[:2],
        "gsm8k_test.jsonl": sums[:4],
        "my_test.jsonl": [{"question": "Which number follows seven hundred and three in counting?"}],
        "passages.jsonl": texts,
        "plain.jsonl": texts,
    }.items():
        folder.joinpath(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.joinpath("qa.csv").write_text("".join(["ask,reply\n", *(f"What is {n}?,A number.\n" for n in range(8))]))
    folder.joinpath("own.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
        "{% if message.role == 'assistant' %}<|fin|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    benchmarks, tasks = folder / "benchmarks", folder / "my_tasks"
    benchmarks.mkdir()
    benchmarks.joinpath("gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums[:4]))
    tasks.mkdir()
    tasks.joinpath("my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: gsm8k_test.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )


def environment(home: Path) -> dict[str, str]:
    """A new user's: nothing of this machine's settings but how it reaches its package index and its Pythons."""
    kept = re.compile(r"^(PATH|LANG|LC_\w+|TERM|USER|TMPDIR|PYENV_ROOT|PIP_\w+|SSL_\w+|REQUESTS_\w+|\w+_proxy)$", re.I)
    cache = os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip")
    found = {name: value for name, value in os.environ.items() if kept.match(name)}
    # HF_HUB_OFFLINE: no hub is reached from here, and waiting for one takes minutes.
    return {**found, "HOME": str(home), "PIP_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
