"""`curation.html`: every part, text of the data never as markup, and opened in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.curate import real_data
from tests.curate.test_run import ITEM, rows, run, settings, write

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & {{ 7*7 }}"


class Page(HTMLParser):
    """Tags, links and text of a page; checks that what is opened is closed."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text, self.style = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.style if self.open and self.open[-1] == "style" else self.text).append(data)


@pytest.fixture
def curated(tmp_path):
    made = rows(120)
    for i in range(0, 60, 6):
        made[i] = real_data.chat(f"Say it {i}: {ATTACK}", f"I'm sorry, but I can't help with that, {ATTACK}")
        made[i + 1] = real_data.chat(
            made[i + 2]["messages"][0]["content"], made[i + 2]["messages"][1]["content"] + " Yes."
        )
    made[70] = real_data.chat(ITEM, "It boils at three hundred and seventy-three kelvin, or a bit less.")
    made[71]["messages"][1]["content"] += " Write to jane@example.com."
    bench = write(
        tmp_path / "bench.jsonl", [{"question": ITEM}, {"question": "Not in there at all, of course, is this?"}]
    )
    path = write(tmp_path / "data.jsonl", made)
    run.curate(settings(tmp_path, path, contamination={"benchmarks": (bench,)}))
    return tmp_path / "out"


def test_the_page_has_every_part_and_needs_no_network(curated):
    text = (curated / "curation.html").read_text()
    page = Page(text)
    shown = " ".join("".join(page.text).split())
    for part in (
        "rows kept", "99", "82.5 % of 120", "refusal", "near duplicate", "similarity 0.", "bench.jsonl row 0",
        "at what temperature in kelvin", "email", "max_length =", "data.jsonl:72", "max_per_task",
    ):  # fmt: skip
        assert part in shown, part
    assert all(link.startswith("#") for link in page.links)
    assert all(f'id="{link[1:]}"' in text for link in page.links)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert ATTACK in "".join(page.text)  # as text
    assert not {"script", "img"} & set(page.tags) and "49" not in text.split("Say it 0")[1][:200]


def test_the_card_cannot_be_broken_by_the_data(curated):
    card = (curated / "dataset_card.md").read_text()
    assert card.startswith("---\n") and "| refusal | 10 |" in card and "bench.jsonl | 2 | 1 | remove" in card
    assert "\n\n\n\n" not in card


@pytest.mark.parametrize("size", [(1280, 1600), (390, 844)])
def test_a_browser_shows_it(curated, tmp_path, size):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here (.ci/run installs it)")
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--hide-scrollbars"]
    command += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, f"file://{curated / 'curation.html'}"], capture_output=True, timeout=90)
    assert shot.exists() and shot.stat().st_size > 20_000, done.stderr[-500:]
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'two'}",
    ]
    dom = subprocess.run([*command, f"file://{curated / 'curation.html'}"], capture_output=True, timeout=90, text=True)
    assert 'id="benchmarks"' in dom.stdout and "alert(1)" in dom.stdout and "<script" not in dom.stdout
