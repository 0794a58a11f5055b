"""The doctor: what is wrong with a run, why it thinks so, and what to change; from the run's folder alone.

    for finding in doctor.diagnose("runs/sft"):
        print(finding.rule, finding.evidence, finding.remedy)

The rules are one table (`rules.RULES`, explained in docs/troubleshooting.md); the first finding is the likeliest cause
of the others.
"""

from sftjax.doctor.rules import RULES, Finding, diagnose, text

__all__ = ["RULES", "Finding", "diagnose", "text"]
