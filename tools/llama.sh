#!/usr/bin/env bash
# llama.cpp's own converter to GGUF, of one release; prints its folder, for the variable LLAMA_CPP. No package installs it, but the source of
# llama-cpp-python brings it along (77 MB, fetched once; 4 MB are kept). Needs `make env`.
set -euo pipefail
cd "$(dirname "$0")/.."

release=0.3.36
home=${WAYSTATION_CACHE:-$HOME/.cache/waystation}/llama-$release
if [ ! -d "$home" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  .venv/bin/python -m pip --disable-pip-version-check download -q --no-deps --no-binary llama-cpp-python -d "$work" "llama-cpp-python==$release" >&2
  tar -xzf "$work"/*.tar.gz -C "$work" --wildcards --strip-components 3 '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
  rm "$work"/*.tar.gz
  mkdir -p "$(dirname "$home")"
  mv -T "$work" "$home"
fi
echo "$home"
