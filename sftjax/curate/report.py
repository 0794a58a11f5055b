"""`curation.html` and `dataset_card.md`, made from what `curation.json` holds and nothing else.

The page is one file that opens offline. Everything that comes from the data is escaped; it may hold any text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jinja2

_RULES = {
    "unreadable": "The row can't be read.",
    "keep_top": "Not among the best-scored.",
    "contamination": "Holds an item of a benchmark.",
    "exact_duplicate": "The same words as a row that stays.",
    "near_duplicate": "Nearly the same words as a row that stays.",
    "semantic_duplicate": "Says what a row that stays says.",
    "max_per_source": "Over the cap of its source.",
    "max_per_task": "Over the cap of its kind of task.",
    "max_per_length": "Over the cap of its length.",
}


def page(found: Mapping[str, Any]) -> str:
    """The page."""
    return templates().get_template("curate/curation.html.j2").render(**_shown(found))


def card(found: Mapping[str, Any]) -> str:
    """The README.md of the kept rows."""
    return templates().get_template("curate/dataset_card.md.j2").render(**_shown(found))


def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sftjax", "."),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "words": _words, "cell": _cell, "yaml": json.dumps}
    return environment


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    about = _RULES | {name: rule["about"] for name, rule in found["quality"]["rules"].items()}
    removed = [
        {"rule": rule, "about": about.get(rule, ""), "share": entry["count"] / max(1, found["rows_read"]), **entry}
        for rule, entry in found["removed"].items()
    ]
    return {
        "found": found,
        "name": ", ".join(source["name"] for source in found["sources"][:3])
        + (" …" if len(found["sources"]) > 3 else ""),
        "removed": removed,
        "before": found["balance"]["before"],
        "after": found["balance"]["after"],
        "steps": _steps(found),
    }


def _steps(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Duplicates by step, with what its mode did."""
    return [
        {"name": name, **entry, "did": "removed" if entry["mode"] == "remove" else "found and kept"}
        for name, entry in found["duplicates"].items()
    ]


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _percent(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    text = f"{100 * value:.1f}".removesuffix(".0")
    return ">99.9 %" if text == "100" and value < 1 else f"{text} %"


def _words(value: str) -> str:
    return str(value).replace("_", " ")


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
