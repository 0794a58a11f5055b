"""How long a curation takes, and how much memory: python tests/curate/measure_scale.py [ROWS] [FOLDER]

Conversations of made-up words (Zipf's law over 40,000 of them, one to three exchanges, about 170 words), one in fifty
a copy with a few words changed, and a benchmark of 2,000 items of which 100 are in the data. All steps are on.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """rows.jsonl and benchmark.jsonl."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    vocabulary = np.array(["".join(rng.choice(syllables, size=rng.integers(1, 5))) for _ in range(40_000)])
    chance = 1 / np.arange(1, len(vocabulary) + 1)
    chance /= chance.sum()

    def sentences(words: int) -> str:
        chosen = vocabulary[rng.choice(len(vocabulary), size=words, p=chance)]
        return ". ".join(" ".join(chosen[i : i + 12]).capitalize() for i in range(0, words, 12)) + "."

    items = [sentences(int(rng.integers(9, 40))) for _ in range(2000)]
    recent: list[list[str]] = []
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            if recent and rng.random() < 0.02:
                texts = [text + " Ba." for text in recent[int(rng.integers(len(recent)))]]
            else:
                turns = int(rng.integers(1, 4))
                texts = [sentences(int(n)) for _ in range(turns) for n in (rng.integers(5, 40), rng.integers(10, 120))]
            if number % max(1, count // 100) == 0:
                texts[0] = items[number // max(1, count // 100) % len(items)]
            recent = [*recent[-500:], texts]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (folder / "benchmark.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": item}) + "\n" for item in items)
    return folder / "rows.jsonl", folder / "benchmark.jsonl"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    rows, benchmark = write(folder, count)
    print(
        f"{count:,} rows, {rows.stat().st_size / 2**20:.0f} MiB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    command = [sys.executable, str(ROOT / "tools" / "curate.py"), f"--config={ROOT}/configs/curate/default.py"]
    command += [f"--config.sources={rows}", f"--config.output={folder / 'out'}"]
    command += [f"--config.contamination.benchmarks={benchmark}"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    wall = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"{wall:.0f} s by the clock, {cpu:.0f} s of CPU; largest process {used.ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
