#!/usr/bin/env bash
# Pins every dependency with its hashes, without naming an index. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
pin() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --no-annotate "$@"
}
pin pyproject.toml --extra dev --output-file locks/dev.lock
pin_part() { pin --constraint locks/dev.lock "$@"; }
pin_part pyproject.toml --extra simulator --extra examples --extra editable --output-file locks/demo.lock
pin_part pyproject.toml --extra simulator --extra examples --extra editable --extra llama --output-file locks/llm.lock
pin_part pyproject.toml --extra wheels --output-file locks/wheels.lock
pin_part pyproject.toml --extra vectors --output-file locks/vectors.lock
pin_part benchmarks/native/requirements.in --output-file locks/bench-native.lock
pin_part pyproject.toml --extra fuzz --extra editable --output-file locks/fuzz.lock
