"""Precision and recall of each rule on real rows with planted faults: python tests/curate/measure_faults.py [SEED]

Where the rows come from is in tests/curate/real_data.py. Prints the table of docs/curation.md. An untouched row that a
rule finds may well have the fault: these are people's texts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sftjax.curate import personal, rules, run, text
from sftjax.curate.settings import from_mapping
from tests.curate import fault_words, planted, real_data

PER_KIND = 40
RULE_OF = {
    "wider_opener": "stock_opener",
    "citation_mark": "hedging",
    "early_belief": "hedging",
    "cut_sentence": "cut_off",
    "mojibake": "encoding_damage",
    "listed_word": "word_list",
}
KIND_OF = {"secret_key": ("key", "password")}


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    base = real_data.conversations()
    bench = real_data.shared("gsm8k_test.jsonl")
    items = [row["question"] for row in real_data.lines(bench)]
    made, truth = planted.plant(base, benchmark=items, per_kind=PER_KIND, seed=seed)
    table = rules.build(word_list=fault_words.SLURS_STAND_INS)
    dialogues = [text.read(row) for row in made]
    fired = [rules.score(one, table)[1] for one in dialogues]
    secrets = [personal.count(part for _, part in one.messages) for one in dialogues]
    planted_rows = {fault.index for fault in truth}
    copied = {fault.of for fault in truth if fault.of is not None}
    clean = [i for i in range(len(made)) if i not in planted_rows]
    by_kind: dict[str, list[int]] = {}
    for fault in truth:
        by_kind.setdefault(fault.kind, []).append(fault.index)
    print(f"{len(base):,} real rows, {PER_KIND} faults of each kind, {len(clean):,} rows untouched, seed {seed}\n")
    print("| planted fault | rule | found | untouched rows found | precision | recall |")
    print("| --- | --- | --- | --- | --- | --- |")

    def line(kind: str, rule: str, hits: int, extra: int) -> None:
        precision = f"{hits / (hits + extra):.0%}" if hits + extra else "–"
        print(f"| {kind} | {rule} | {hits} of {PER_KIND} | {extra} | {precision} | {hits / PER_KIND:.0%} |")

    for fault in planted.QUALITY:
        rule = RULE_OF.get(fault.__name__, fault.__name__)
        hits = sum(rule in fired[i] for i in by_kind[fault.__name__])
        line(fault.__name__, rule, hits, sum(rule in fired[i] for i in clean))
    for fault in planted.PERSONAL:
        names = KIND_OF.get(fault.__name__, (fault.__name__.split("_")[1],))
        hits = sum(any(name in secrets[i] for name in names) for i in by_kind[fault.__name__])
        line(fault.__name__, " or ".join(names), hits, sum(any(name in secrets[i] for name in names) for i in clean))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(b"\n".join(map(orjson.dumps, made)))
        contamination = {"benchmarks": (str(bench),)}
        given = {
            "sources": (str(path),),
            "output": folder,
            "contamination": contamination,
            "quality": {"preset": "none"},
        }
        run.curate(from_mapping(given))
        removed = {line["index"]: line["rule"] for line in real_data.lines(Path(folder) / "removed.jsonl")}
    steps = {"exact_copy": "exact_duplicate", "near_copy": "near_duplicate", "paraphrase": "semantic_duplicate"}
    untouched = [i for i in clean if i not in copied]
    by_step = {rule: sum(removed.get(i) == rule for i in untouched) for rule in (*steps.values(), "contamination")}
    for kind, rule in steps.items():
        hits = sum(fault.index in removed or fault.of in removed for fault in truth if fault.kind == kind)
        line(kind, rule, hits, by_step[rule])
    for fault in planted.LEAKS:
        hits = sum(removed.get(i) == "contamination" for i in by_kind[fault.__name__])
        line(fault.__name__, "contamination", hits, by_step["contamination"])
    gone = sum(i in removed for i in untouched)
    print(f"\nDuplicates and leaks, untouched rows removed: {gone} of {len(untouched)} ({gone / len(untouched):.2%}).")
    low = sum(1 for i in clean if sum(fired[i].values()) > 0.3 + 1e-9)
    print(f"Untouched rows with a score below 0.7: {low} of {len(clean)} ({low / len(clean):.1%}).")


if __name__ == "__main__":
    main()
