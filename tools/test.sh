#!/usr/bin/env bash
# Set-up and tests.
set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat << 'TEXT'
Usage: bash tools/test.sh [--python 3.12] [--slow | --slow_only | --nightly] [--parity] [--setup_only] [pytest's arguments]

Makes a virtual environment, installs the project with what its tests need, and runs them. On the CPU, without torch.
  --python VERSION   that Python instead of the newest that works
  --slow             the slow tests as well (tests/slow.txt): twice the time
  --slow_only        only those
  --nightly          all there are
  --parity           only the live comparisons with torch, transformers, peft and llama.cpp, in an environment of their
                     own; and another one for transformers 4
  --setup_only       no tests yet
Other arguments go to pytest:  bash tools/test.sh tests/data -k packing -x
TEXT
}

python_wanted="" only="" left=" and not slow and not nightly" parity="" setup_only="" rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --python) [ $# -ge 2 ] || fail "--python needs a version, as in --python 3.12"
      python_wanted=$2 && shift ;;
    --python=*) python_wanted=${1#*=} ;;
    --slow) left=" and not nightly" ;;
    --slow_only) only="slow and " left=" and not nightly" ;;
    --nightly) left="" ;;
    --parity) parity=yes ;;
    --setup_only) setup_only=yes ;;
    *) rest+=("$1") ;;
  esac
  shift
done

select="${only}not parity$left"
if [ -n "$parity" ]; then
  select="parity$left"
  # The pinned torch has the smallest build for 3.11; where there is no 3.11, any other will do.
  [ -n "$python_wanted" ] || ! find_python 3.11 || python_wanted=3.11
  require_python "$python_wanted"
  install_requirements ".venv-$PYTHON_VERSION-tf4" tests/parity/transformers-4.txt
  install_project ".venv-$PYTHON_VERSION-parity" test parity
else
  require_python "$python_wanted"
  install_project ".venv-$PYTHON_VERSION" test
fi
[ -z "$setup_only" ] || exit 0

cd "$ROOT"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1
say "Testing with Python $PYTHON_VERSION, $("$VENV_PYTHON" -c 'import jax; print("jax", jax.__version__)'): $select"
workers=$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1)
[ "$workers" -le 4 ] || workers=4 # each holds a model or two
exec "$VENV_PYTHON" -m pytest -m "$select" -n "$workers" --dist loadfile --no-loadscope-reorder ${rest[@]+"${rest[@]}"}
