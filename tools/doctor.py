"""Says what is wrong with a run, why it thinks so, and what to change; reads the run's folder and nothing else.

Prints each finding with its remedy, the likeliest cause of the others first. With --json, a list in that order:
  [{"rule": name, "evidence": the figures, in words, "remedy": what to change, with the field of the configuration}]
A healthy run gives an empty list. Every rule is explained in docs/troubleshooting.md. The exit code is 0 either way.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--json", action="store_true", help="print the list")
    args = parser.parse_args()

    from sftjax import doctor

    findings = doctor.diagnose(args.run)
    print(json.dumps([finding._asdict() for finding in findings], indent=2) if args.json else doctor.text(findings))
    return 0


if __name__ == "__main__":
    exit_with_message(main)
