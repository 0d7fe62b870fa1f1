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
pin_part pyproject.toml --extra device --extra onnx --output-file locks/device.lock
pin_part pyproject.toml --extra vectors --output-file locks/vectors.lock
pin_part benchmarks/native/requirements.in --output-file locks/bench-native.lock
# Builds of onnxruntime for accelerators, each alone: they take the place of the ordinary one in front of it on the path.
pin --no-deps tests/accelerators/openvino.in --output-file locks/openvino.lock
pin --no-deps tests/accelerators/cuda.in --output-file locks/cuda.lock
pin_part --no-deps tests/accelerators/vulkan.in --output-file locks/vulkan.lock
pin_part pyproject.toml --extra fuzz --extra editable --output-file locks/fuzz.lock
pin_part pyproject.toml --extra token --extra editable --output-file locks/token.lock
pin_part pyproject.toml --extra browser --extra editable --output-file locks/browser.lock

# On Linux the ordinary build of PyTorch brings several GB of CUDA, which nothing here uses: there the CPU build of the same
# version is pinned (for CPython 3.11 on x86-64), which pip finds in PyTorch's own index or in a folder of PIP_FIND_LINKS.
bench=(pyproject.toml --extra bench --output-file locks/bench.lock)
pin_part "${bench[@]}"
mapfile -t cuda < <(sed -nE 's/^((cuda|nvidia|triton)[a-z0-9-]*)==.*/--no-emit-package=\1/p' locks/bench.lock)
pin_part "${bench[@]}" "${cuda[@]}"
sed -i "s/^torch==2\.13\.0 /torch==2.13.0 ; sys_platform != 'linux' /" locks/bench.lock
cat >>locks/bench.lock <<'LINUX'
torch==2.13.0+cpu ; sys_platform == 'linux' \
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
LINUX
