# Set-up shared by quickstart.sh and test.sh: find a Python, make its virtual environment, install the project into it.
# Sourced, from any folder; needs nothing but bash (3.2 or later) and a Python with venv. pip's own settings
# (index, certificates, cache) are honoured.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONS="3.13 3.12 3.11" # newest first

say() { printf '%s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Does interpreter $1 have version $2 and all that a virtual environment needs? A name on PATH proves little:
# version managers leave stubs that only print a message, and Debian ships Pythons without venv.
python_works() {
  "$1" -c "import ctypes, ensurepip, ssl, sys, venv; sys.exit(sys.version_info[:2] != (${2/./, }))" > /dev/null 2>&1
}

# Places to look for Python $1, one a line, best first.
python_candidates() {
  local name found
  for name in "python$1" python3 python; do
    type -ap "$name" || true
  done
  for found in $(type -ap "python$1" || true); do # a version manager's stub: the real ones lie beside it
    case "$found" in */shims/*) ls -d "${found%/shims/*}"/versions/"$1"*/bin/"python$1" 2> /dev/null || true ;; esac
  done
  ls -d "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/"$1"*/bin/"python$1" 2> /dev/null || true
}

# Sets PYTHON_VERSION and PYTHON_PATH: version $1 or, without one, the newest that works.
find_python() {
  local version candidate
  for version in ${1:-$PYTHONS}; do
    while IFS= read -r candidate; do
      if python_works "$candidate" "$version"; then
        PYTHON_VERSION=$version PYTHON_PATH=$candidate
        return 0
      fi
    done < <(python_candidates "$version")
  done
  return 1
}

require_python() {
  case " $PYTHONS " in *" ${1:-3.11} "*) ;; *) fail "--python $1: choose one of $PYTHONS" ;; esac
  find_python "${1:-}" && return
  fail "no working Python ${1:-3.11, 3.12 or 3.13} found. Install one with its venv module" \
    "(Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12) and run this again."
}

# The extra that brings jax its accelerator: cuda13, cuda12, tpu, or nothing.
accelerator_extra() {
  local driver device
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null); then
    driver=${driver%%.*}
    case "$driver" in '' | *[!0-9]*) return 0 ;; esac
    if [ "$driver" -ge 580 ]; then
      echo cuda13
    elif [ "$driver" -ge 525 ]; then
      echo cuda12
    else
      say "the NVIDIA driver ($driver) is older than 525, the first that jax can use: going on without the GPU" >&2
    fi
    return 0
  fi
  for device in /sys/bus/pci/devices/*; do # a TPU VM: Google's vendor number with one of the chips that jax knows
    [ "$(cat "$device/vendor" 2> /dev/null)" = 0x1ae0 ] || continue
    case "$(cat "$device/device")" in 0x0027 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
      echo tpu
      return 0
      ;;
    esac
  done
}

# Shows pip's work as one line that is rewritten (a terminal) or not at all (a log).
progress_line() {
  local line
  while IFS= read -r line; do
    [ -t 1 ] || continue
    case "$line" in Collecting* | *Downloading* | Installing* | *Building*) printf '\r\033[K  %.100s' "$line" ;; esac
  done
  [ -t 1 ] && printf '\r\033[K'
  return 0
}

require_disk() {
  local free
  free=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$1" ] || fail "$ROOT has $free GB free, the installation needs $1 GB: make room and run this again"
}

# Makes the virtual environment $1 if it isn't there. Sets VENV_PYTHON.
make_venv() {
  VENV_PYTHON="$ROOT/$1/bin/python"
  "$VENV_PYTHON" -m pip --version > /dev/null 2>&1 && return
  require_disk 4
  say "Making $1 with Python $PYTHON_VERSION ($PYTHON_PATH)"
  "$PYTHON_PATH" -m venv --clear "$ROOT/$1" || fail "could not make the virtual environment $1 with $PYTHON_PATH"
}

# Brings the virtual environment $1 to the requirements in the file $2, without the project: another program's.
install_requirements() {
  local stamp="$ROOT/$1/requirements.txt" log="$ROOT/$1/pip.log"
  make_venv "$1"
  cmp -s "$ROOT/$2" "$stamp" && return
  say "Installing $2 into $1"
  if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off -r "$ROOT/$2" 2>&1 |
    tee "$log" | progress_line; then
    tail -n 12 "$log" >&2
    fail "pip could not install $2 (whole log: $log). Is there a network, and does pip reach its index?"
  fi
  cp "$ROOT/$2" "$stamp"
}

# Brings the virtual environment $1 to: the project, editable, with the extras that follow. Sets VENV_PYTHON.
# What was installed is written down in a stamp, so that a second call with nothing changed costs milliseconds.
install_project() {
  local venv="$ROOT/$1" stamp="$ROOT/$1/sftjax-stamp" log="$ROOT/$1/pip.log" key extra missing="" all
  make_venv "$1"
  shift
  key="$("$VENV_PYTHON" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read() + sys.version.encode() + sys.argv[1].encode()).hexdigest())' \
    "$ROOT/pyproject.toml")"
  if [ "$(head -n 1 "$stamp" 2> /dev/null)" != "$key" ]; then
    rm -f "$stamp"
    missing=yes
  fi
  for extra in "$@"; do
    grep -qsx "$extra" "$stamp" || missing=yes
  done
  [ -n "$missing" ] || return 0

  all="$( (tail -n +2 "$stamp" 2> /dev/null || true; printf '%s\n' "$@") | sed '/^$/d' | sort -u)"
  case "$all" in *cuda*) require_disk 12 ;; *) require_disk 4 ;; esac
  extra="$(printf '%s' "$all" | paste -sd, -)"
  say "Installing sftjax${extra:+ [$extra]} into ${venv##*/}: a few minutes the first time"
  if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off \
    -e "$ROOT${extra:+[$extra]}" 2>&1 | tee "$log" | progress_line; then
    tail -n 12 "$log" >&2
    fail "pip could not install the project (whole log: $log). Is there a network, and does pip reach its index?"
  fi
  printf '%s\n' "$key" $all > "$stamp"
}
