"""Reads a program's arguments with its own parser, and ends before it does anything: python parse_only.py FILE ARGS

parse_only.py tools/plan.py --config=... --topology=...        parse_only.py -m sftjax.main --config=...
"""

import argparse
import os
import runpy
import sys

from absl import app, flags

sys.path.insert(0, os.getcwd())


def parse_and_leave(parser, args=None, namespace=None):
    parse_known(parser, args, namespace)
    raise SystemExit(0)


def run(main, argv=None, flags_parser=None):
    left = (flags_parser or flags.FLAGS)(argv or sys.argv)
    if left[1:]:
        raise SystemExit(f"arguments that the program doesn't know: {left[1:]}")
    raise SystemExit(0)


parse_known = argparse.ArgumentParser.parse_args
argparse.ArgumentParser.parse_args = parse_and_leave
app.run = run
if sys.argv[1] == "-m":
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    del sys.argv[:1]
    runpy.run_path(sys.argv[0], run_name="__main__")
raise SystemExit(f"{sys.argv[0]} never parsed its arguments")
