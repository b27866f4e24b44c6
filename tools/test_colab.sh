#!/usr/bin/env bash
# The journey on Colab's versions: a fresh Python 3.13 with what the image has of what we use, the bootstrap cells' own
# install commands (on this checkout instead of git+https), then setup, embed and export as notebooks. No torch is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(tools/python313) || { echo "test-colab: no Python 3.13 here; install one or set WAYSTATION_PYTHON313 to its path" >&2; exit 1; }

image=(jax jaxlib flax numpy pandas pyarrow fsspec gcsfs tokenizers safetensors matplotlib ipykernel nbclient Jinja2 duckdb wandb psutil PyYAML tqdm fastcore)
cells() { .venv/bin/python tests/colab/journey.py bootstrap; }  # the install commands, from the notebooks
key=$({ "$python" -VV; echo "${image[@]}"; cat tests/colab/plain.txt tools/test_colab.sh; .venv/bin/python tools/extras.py embed export cloud monitor; cells | sed "s|$PWD|.|g"; } | sha256sum | cut -c1-16)
home=.env-colab
if [ -n "${WAYSTATION_ENVS:-}" ]; then mkdir -p "$WAYSTATION_ENVS"; home=$WAYSTATION_ENVS/colab-$key; fi

if [ "$(cat "$home/.key" 2>/dev/null)" != "$key" ]; then
  echo "test-colab: making $home" >&2
  rm -rf "$home"
  "$python" -m venv "$home"
  pins=()
  for name in "${image[@]}"; do pins+=("$(grep -i "^${name//-/[-_]}==" tests/colab/plain.txt)"); done
  "$home/bin/python" -m pip --disable-pip-version-check install -q --no-compile -c tests/colab/plain.txt "${pins[@]}"
  "$home/bin/python" -m pip list --format=freeze | sort >"$home/.image"
  cells | while read -r command; do echo "+ $command" >&2; PATH="$PWD/$home/bin:$home/bin:$PATH" PIP_NO_COMPILE=1 sh -c "$command" </dev/null; done
  # What the image had before, it still has: the same versions of everything.
  if changed=$("$home/bin/python" -m pip list --format=freeze | sort | comm -13 - "$home/.image") && [ -n "$changed" ]; then
    echo "test-colab: the bootstrap cells replaced" $changed >&2
    exit 1
  fi
  "$home/bin/python" -m pip --disable-pip-version-check install -q --no-compile -c tests/colab/plain.txt papermill  # the test's own driver
  echo "$key" >"$home/.key"
fi
"$home/bin/python" -m pip --disable-pip-version-check uninstall -q -y waystation
"$home/bin/python" -m pip --disable-pip-version-check install -q --no-deps .  # the wheel of this very checkout, notebooks inside
PYDEVD_DISABLE_FILE_VALIDATION=1 "$home/bin/python" tests/colab/journey.py run
