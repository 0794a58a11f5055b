"""The report and the model card: made of the run's files, whatever is missing, whatever they hold."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from sftjax import report, sweep
from sftjax.charts import Series, line_chart, number, smooth, thin, ticks
from tests import browser

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
PATH = "/home/somebody/models/SmolLM2-135M-Instruct"


def make_run(folder, steps=120):
    """A run folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name, value):
        (folder / name).write_text(json.dumps(value))

    def dump_lines(name, values):
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))

    wave = [math.sin(step * 12.9898) * 0.5 for step in range(steps + 1)]
    metrics, timing = [{"step": 0, "eval_loss": 2.9134, "eval_mean_token_accuracy": 0.41}], []
    for step in range(1, steps + 1):
        metrics.append(
            {
                "step": step,
                "loss": 1.9 + 1.1 * math.exp(-step / 25) + 0.25 * wave[step],
                "grad_norm": 0.8 + 2 * math.exp(-step / 8) + 0.2 * wave[step],
                "learning_rate": 2e-4 * min(step / 6, 0.5 * (1 + math.cos(math.pi * step / steps))),
                "epoch": step / steps,
                "num_tokens": 8160 * step,
                "num_trained_tokens": 4100 * step,
                "mean_token_accuracy": 0.58 - 0.17 * math.exp(-step / 30) + 0.02 * wave[step],
            }
        )
        if step > 1:
            rate = 1540 + 60 * wave[step]
            timing.append(
                {
                    "step": step,
                    "time": 1.7e9 + step,
                    "step_seconds": 8160 / rate,
                    "tokens_per_second": rate,
                    "trained_tokens_per_second": rate / 2,
                    "padded_tokens_per_second": rate * 1.004,
                }
            )
        if step % 40 == 0:
            metrics.append(
                {"step": step, "eval_loss": 2.9134 - 0.26 * step / 40, "eval_mean_token_accuracy": 0.41 + step / 1000}
            )
    dump_lines("metrics.jsonl", metrics)
    dump_lines("timing.jsonl", timing)
    questions = ["I just moved to Lisbon and know nobody.", f"My cat is called {ATTACK}"]
    dump_lines(
        "samples.jsonl",
        [
            {
                "step": step,
                "messages": [{"role": "system", "content": "You are a friend."}, {"role": "user", "content": question}],
                "answer": f"As an AI ({step}) I'd suggest … {ATTACK}"
                if step == 0
                else f"Oh nice, how do you like it? {'😀' * (step // 40)}",
            }
            for step in (0, 40, 80, 120)
            for question in questions
        ],
    )
    dump_lines(
        "masks.jsonl",
        [
            {
                "source": "chitchat",
                "index": index,
                "sample": index,
                "pieces": [
                    {"text": "<|im_start|>user\nhow was your day?<|im_end|>\n<|im_start|>assistant\n", "weight": 0},
                    {"text": "long, but good. yours?<|im_end|>", "weight": 1.0},
                    {"text": f"\n<|im_start|>user\n{ATTACK}<|im_end|>\n<|im_start|>assistant\n", "weight": 0.0},
                    {"text": "half of this counts<|im_end|>", "weight": 0.5},
                ],
            }
            for index in range(2)
        ],
    )
    dump(
        "preflight.json",
        {
            "complete": True, "max_length": 1024, "rows_in_epoch": 5321, "rows_read": 5321, "rows_dropped": 14,
            "dropped": {"no_assistant_turn": {"count": 9, "rows": {"chitchat": ["chat.jsonl:4", "chat.jsonl:78"]}},
                        "empty_answer": {"count": 5, "rows": {"chitchat": [12, 40]}}},
            "samples": 5307, "tokens": 979_200, "trained_tokens": 492_000, "trained_share": 0.5024,
            "truncated": 3, "lost_tokens": 812, "lost_trained_tokens": 390, "flags": {"straddle": 2},
            "stop_trained": 1.0, "double_bos": 0,
            "length": {"p50": 171, "p90": 310, "p99": 622, "max": 1440, "mean": 184.5},
            "coverage": 0.9994, "proposed_length": 512, "packing_efficiency": 0.9961, "steps": steps,
            "tokens_to_come": 979_200,
            "per_source": {"chitchat": {"rows": 4000, "tokens": 700_000, "trained_share": 0.51},
                           "<b>other": {"rows": 1321, "tokens": 279_200, "trained_share": 0.48}},
            "warnings": ["14 rows have no answer to train on; see the row numbers below"], "problems": [],
        },
    )  # fmt: skip
    dump(
        "config.json",
        {
            "seed": 0,
            "run_dir": "runs/quickstart",
            "model": {"path": PATH, "compute_dtype": "bfloat16", "remat": "full"},
            "data": {"train": ["chitchat"], "max_length": 1024, "packing": "first_fit"},
            "train": {"batch_size": 8, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "optim": "adamw"},
            "peft": {"method": "lora", "r": 16, "lora_alpha": 32.0, "rank_pattern": []},
            "export": {"merge": True, "dtype": "bfloat16"},
        },
    )
    dump(
        "environment.json",
        {
            "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
            "backend": "cpu",
            "device_kind": "cpu",
            "device_count": 1,
            "process_count": 1,
            "fingerprints": {"data": "9f2b6c0d4e8a", "tokenizer": "51aa03b7"},
        },
    )
    dump(
        "summary.json",
        {
            "steps": steps,
            "eval_loss_before": 2.9134,
            "eval_loss_after": 2.1334,
            "difference": -0.78,
            "difference_95": [-0.8126, -0.7481],
            "held_out_examples": 300,
            "held_out_trained_tokens": 27_000,
        },
    )
    dump(
        "verification.json",
        {
            "passed": True,
            "max_difference": 2.1e-6,
            "top1_agreement": 1.0,
            "tokens": 512,
            "compared_with": "bfloat16 weights",
        },
    )
    return folder


class Page(HTMLParser):
    """Tags, links and text of a page; checks that what is opened is closed."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def rendered(folder):
    with open(report.write(str(folder)), encoding="utf-8") as file:
        text = file.read()
    return text, Page(text)


def test_report_shows_every_part_and_needs_no_network(tmp_path):
    text, page = rendered(make_run(tmp_path / "quickstart"))
    shown = "".join(page.text)
    for part in (
        "2.913 → 2.133", "-0.7800, 95 % interval -0.8126 to -0.7481", "no assistant turn",
        "chat.jsonl:4, chat.jsonl:78",
        "50.2 %", "after step 120", "long, but good. yours?", "tokens / s", "verified",
        "learning_rate", "0.10.2", "9f2b6c0d4e8a",
    ):  # fmt: skip
        assert part in shown, part
    assert page.tags.count("svg") >= 5
    assert all(link.startswith("#") for link in page.links), page.links
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert len(text) < 200_000


def test_text_of_the_run_is_never_markup(tmp_path):
    folder = make_run(tmp_path / ATTACK.replace("/", ""))
    text, page = rendered(folder)
    assert "img" not in page.tags and "<b>other" not in text
    scripts = re.findall(r"<script[^>]*>", text)
    assert scripts.count("<script>") == 1  # ours
    assert "<script>alert(1)</script>" in "".join(page.text)  # as text


@pytest.mark.parametrize("missing", [
    "summary.json", "config.json", "environment.json", "preflight.json", "verification.json",
    "metrics.jsonl", "timing.jsonl", "samples.jsonl", "masks.jsonl",
])  # fmt: skip
def test_a_missing_or_broken_file_leaves_out_its_part_only(tmp_path, missing):
    folder = make_run(tmp_path / "run")
    (folder / missing).write_text('{"torn')
    rendered(folder)
    report.model_card(str(folder))
    (folder / missing).unlink()
    text, _ = rendered(folder)
    assert "Written by sftjax" in text
    assert report.model_card(str(folder)).startswith("---\nlibrary_name: transformers\n")


def test_empty_folder_gives_a_page_that_says_so(tmp_path):
    text, _ = rendered(tmp_path)
    assert "Nothing was logged yet" in text


def test_odd_values_do_not_break_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 1.0},
        {"loss": 3.0},
        [1],
        {"step": 3, "loss": None, "grad_norm": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text('{"step": 0}\n{"step": 1, "messages": "x", "answer": null}\n')
    (folder / "masks.jsonl").write_text(
        '{"index": 1}\n{"pieces": [{"text": "' + "y" * 20_000 + '"}, {"weight": null}]}\n'
    )
    _, page = rendered(folder)
    assert len("".join(page.text)) < 60_000


def test_model_card_tells_the_numbers_and_no_path_of_this_machine(tmp_path):
    folder = make_run(tmp_path / "quickstart")
    card = report.model_card(str(folder))
    assert "| nats per trained token | 2.9134 | 2.1334 | -0.8126 to -0.7481 |" in card
    assert "SmolLM2-135M-Instruct" in card and "/home" not in card and "base_model" not in card
    assert "learning rate | 0.0002" in card and "300 conversations" in card and "0.10.2" in card
    assert "<b>" not in card and "&lt;b>other" in card
    assert not re.search(r"\n\n\n\n", card)


def test_model_card_of_an_adapter_on_a_hub_model(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["path"], config["export"]["merge"] = "org/model-1.7B", False
    (folder / "config.json").write_text(json.dumps(config))
    card = report.model_card(str(folder))
    assert card.startswith('---\nlibrary_name: peft\npipeline_tag: text-generation\nbase_model: "org/model-1.7B"\n')
    assert "AutoPeftModelForCausalLM" in card


def test_fence_cannot_be_closed_from_inside():
    assert report._fence("a ```` b").startswith("`````text\n")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_browser_shows_it(tmp_path, size):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here (.ci/run installs it)")
    path = report.write(str(make_run(tmp_path / "run")))
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--hide-scrollbars"]
    command += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, timeout=90)
    assert shot.exists() and shot.stat().st_size > 20_000, done.stderr[-500:]


# --- charts -----------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.83, 3.1, 5) == [1.5, 2.0, 2.5, 3.0, 3.5]
    for low, high in ((5, 5), (0, 0), (-3, -3), (1e-9, 2e-9), (-1, 1e6)):
        found = ticks(low, high, 5)
        assert found[0] <= low and found[-1] >= high and len(found) < 12


def test_lines_break_at_gaps_and_keep_spikes():
    svg = line_chart([Series("loss", range(5), [1.0, 2.0, None, 3.0, float("nan")])], title="t")
    assert svg.count("<polyline") == 1 and svg.count("<circle") == 1  # two points, gap, one point
    points = [(float(x), 1.0) for x in range(5000)]
    points[3456] = (3456.0, 99.0)
    assert (3456.0, 99.0) in thin(points) and len(thin(points)) <= 400
    assert line_chart([Series("x", [1], [None])], title="t") == ""


def test_smooth_starts_unbiased():
    assert smooth([2.0, 2.0, None, 2.0], 3) == pytest.approx([2.0, 2.0, None, 2.0])


def test_numbers_for_people():
    values = (0, 1234.0, 2.5, 1.9e-5, 0.0123, 8030261248.0)
    assert [number(value) for value in values] == ["0", "1,234", "2.5", "1.9e-05", "0.0123", "8.03 G"]
    assert os.path.basename(PATH) == "SmolLM2-135M-Instruct"


SMALLEST = """(() => {
    const sizes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
        if (!text || element.closest("script, style") || !element.checkVisibility()) continue;
        const svg = element.closest("svg"), size = parseFloat(getComputedStyle(element).fontSize);
        const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
        sizes.push([size * scale, text]);
        if (svg) {  // nothing of a label is outside its chart
            const box = element.getBoundingClientRect(), frame = svg.getBoundingClientRect();
            if (box.left < frame.left - 1 || box.right > frame.right + 1) sizes.push([0, text + " is cut off"]);
        }
    }
    const cells = [...document.querySelectorAll("td")].filter(cell => cell.checkVisibility() && cell.innerText.trim());
    const narrowest = cells.map(cell => cell.getBoundingClientRect().width);
    return {smallest: sizes.sort((a, b) => a[0] - b[0])[0], ticks: document.querySelectorAll("svg .tick").length,
            wider: document.documentElement.scrollWidth > innerWidth, cell: Math.min(...narrowest)};
})()"""


@pytest.mark.parametrize("width", [360, 430, 560, 768, 1280])
def test_every_label_can_be_read_at_every_width(tmp_path, width):
    """Of the run's page and of a sweep's: nothing is smaller than ten pixels or cut off, on a phone too."""
    folder = make_run(tmp_path / "run")
    sweep.write(str(tmp_path), [{"name": "run", "settings": {"train.learning_rate": 1e-4}, "status": "done"}])
    report.write(str(folder))
    with browser.open_page(f"file://{folder}/report.html", tmp_path / "profile") as page:
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        page.call("Emulation.setDeviceMetricsOverride", **screen)
        for path in (folder / "report.html", tmp_path / "sweep.html"):
            page.load(f"file://{path}")
            seen = page.evaluate(SMALLEST)
            assert seen["smallest"][0] >= 10 and not seen["wider"] and seen["ticks"] > 10 and seen["cell"] > 24, seen
