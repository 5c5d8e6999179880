#!/usr/bin/env bash
# Generates the committed protobuf code. With --check: fails where the committed code differs.
# A pinned old grpcio-tools in an environment of its own, so that the code loads under protobuf 5.29 to 7.x.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-protos
tools=(grpcio-tools==1.71.2 grpcio==1.71.2 protobuf==5.29.5 mypy-protobuf==3.6.0 types-protobuf==5.29.1.20250403 setuptools==75.8.0)
stamp="$venv/$(printf '%s ' "${tools[@]}" | cksum | cut -d' ' -f1).stamp"
if [ ! -f "$stamp" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "${tools[@]}"
  touch "$stamp"
fi
out=protos
if [ "${1:-}" = "--check" ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  protos/equipot/wire/*/*.proto
if [ "${1:-}" = "--check" ]; then
  for made in "$out"/equipot/wire/*/*; do
    kept="protos/${made#"$out"/}"
    if ! cmp -s "$made" "$kept"; then
      echo "$kept is out of date: run scripts/gen_protos.sh" >&2
      exit 1
    fi
  done
  echo "generated protobuf code is up to date"
fi
