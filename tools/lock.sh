#!/usr/bin/env bash
# Pins every dependency with its hashes, without naming an index. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
pin() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --no-annotate pyproject.toml "$@"
}
pin --extra dev --output-file locks/dev.lock
pin --constraint locks/dev.lock --extra simulator --extra examples --extra editable --output-file locks/demo.lock
pin --constraint locks/dev.lock --extra simulator --extra examples --extra editable --extra llama --output-file locks/llm.lock
pin --constraint locks/dev.lock --extra wheels --output-file locks/wheels.lock
pin --constraint locks/dev.lock --extra vectors --output-file locks/vectors.lock
