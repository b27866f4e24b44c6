#!/usr/bin/env bash
# Make .venv with everything that the demo, the tests and the site need; do nothing when it is current.
#
#   PYTHON=python3.12 tools/env.sh       another interpreter (3.11 to 3.13; the first that is found otherwise)
#   WAYSTATION_ENVS=~/.cache/waystation/envs tools/env.sh
#                                        keep the environment there under its hash, .venv is a link to it:
#                                        a fresh checkout with the same requirements is ready at once
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tools/env.sh
#                                        on Linux: the small torch without CUDA (0.2 GB instead of 3)
set -euo pipefail
cd "$(dirname "$0")/.."

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
python=${PYTHON:-}
for candidate in python3.11 python3.12 python3.13 python3; do
  [ -n "$python" ] && break
  if usable "$candidate"; then python=$candidate; fi
done
if [ -z "$python" ] || ! usable "$python"; then
  echo "env: Python 3.11, 3.12 or 3.13 is needed and ${PYTHON:-none of python3.11, python3.12, python3.13, python3} is one;" \
    "install it or say PYTHON=/path/to/python3.11 make env" >&2
  exit 1
fi

# What decides the contents: the interpreter, the requirements in pyproject (its other tables may change), the pins.
requirements=$("$python" - <<'PY'
import sys, tomllib
p = tomllib.load(open("pyproject.toml", "rb"))
print(sys.version, sys.platform, p["build-system"], p["project"]["dependencies"], p["project"]["optional-dependencies"])
PY
)
hash() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'; }
key=$({ echo "$requirements"; cat requirements/cpu.txt; } | hash)
# What decides the editable install: this checkout, and what pyproject says about the package.
here=$({ pwd; cat pyproject.toml; } | hash)

home=.venv
if [ -d .venv ] && [ ! -L .venv ]; then WAYSTATION_ENVS=; fi  # a folder of its own is kept, and kept up to date
if [ -n "${WAYSTATION_ENVS:-}" ]; then
  home=$WAYSTATION_ENVS/cpu-$key
  mkdir -p "$WAYSTATION_ENVS"
  exec 9>"$home.lock"
  if command -v flock >/dev/null; then flock 9; fi  # two checkouts may want the same one at once
fi

if [ "$(cat "$home/.key" 2>/dev/null)" != "$key" ]; then
  echo "env: making $home with $("$python" --version) (some minutes, about 3 GB)" >&2
  rm -f "$home/.key" "$home/.here"
  if ! [ "$("$home/bin/python" -V 2>/dev/null)" = "$("$python" -V)" ]; then clear=--clear; fi  # otherwise brought up to date in place
  "$python" -m venv ${clear:-} "$home" || { echo "env: no venv module in $python; on Debian: apt-get install python3-venv" >&2; exit 1; }
  pip() { "$home/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install -q --no-compile "$(grep '^torch==' requirements/cpu.txt)"
  # --no-compile: of 3 GB of modules most are never imported, and Python compiles the others when they are.
  # The extra `dev` names the others, so it is spelled out here rather than asked of a project that is not installed yet.
  # shellcheck disable=SC2046
  pip install -q --no-compile -c requirements/cpu.txt $("$home/bin/python" tools/extras.py dev)
  echo "$key" >"$home/.key"
fi

if [ -n "${WAYSTATION_ENVS:-}" ]; then
  ln -sfn "$home" .venv
  touch "$home"
  # Environments that nobody has asked for in a month; each is 3 GB.
  find "$WAYSTATION_ENVS" -mindepth 1 -maxdepth 1 -name 'c[po]*-*' -mtime +30 -exec rm -rf {} + || true
fi

if [ "$(cat "$home/.here" 2>/dev/null)" != "$here" ] || ! "$home/bin/python" -c 'import importlib.metadata as m; m.version("waystation")' 2>/dev/null; then
  "$home/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
  echo "$here" >"$home/.here"
fi
