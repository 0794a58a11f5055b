"""Writes anew the table of the fields that transformers knows, from the transformers that is installed.

It is `sftjax/weights/reference.json`; the differences are for a person to read before they are committed: a field that
is new in transformers is refused from then on, unless its family reads it or `sftjax/weights/fields.py` lists it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    Parser(description=__doc__).parse_args()
    from sftjax.weights import families, reference_scan, wrappers

    reference_scan.write([*families.FAMILIES, *wrappers.TEXT_ALIASES])
    return 0


if __name__ == "__main__":
    exit_with_message(main)
