"""Runs one target under atheris: `python -m tests.fuzz.fuzz_gguf -max_total_time=60`. The only importer of the fuzzer.

Options are libFuzzer's. Unless given, an input may take ten seconds and the process 512 MiB; what is new is kept in
.cache/fuzz/<target>/corpus, and what finds something in .cache/fuzz/<target>/findings.
"""

import importlib
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = Path(__file__).resolve().parent / "corpus"
WORK = ROOT / ".cache" / "fuzz"

INPUT_BYTES_MAX = 32 << 10
INPUT_TIME_S_MAX = 10
PROCESS_MIB_MAX = 512
"""Interpreter, numpy and the fuzzer's corpus take some 120; the reader may take 32 when it is told to."""


def fuzz(name: str) -> None:
    """Fuzz a target until the time is over or something is found; does not return."""
    # Only what was imported here counts as covered, so nothing of it may have been imported before.
    with atheris.instrument_imports(include=["protocol"]):
        importlib.import_module("protocol.tensors")
    # Paths only: each comparison of arrays that atheris 3.0 follows leaks its result, megabytes a second here.
    with atheris.import_hook.HookManager(
        {"protocol"}, set(), enable_loader_override=True, trace_dataflow=False
    ):
        from tests.fuzz.mutation import MUTATORS  # noqa: PLC0415
        from tests.fuzz.targets import SEED_FOLDERS, TARGETS  # noqa: PLC0415

    mutate, target = MUTATORS[name], TARGETS[name]

    def changed(data: bytes, size: int, seed: int) -> bytes:
        return mutate(data, size, seed, atheris.Mutate)

    corpus, findings = WORK / name / "corpus", WORK / name / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_TIME_S_MAX}",
        f"-rss_limit_mb={PROCESS_MIB_MAX}",
        f"-artifact_prefix={findings}/",
        "-use_value_profile=1",
        "-print_final_stats=1",
    ]
    given = sys.argv[1:]
    folders = (
        []
        if any(not option.startswith("-") for option in given)
        else [str(corpus), str(SEEDS / SEED_FOLDERS[name])]
    )
    atheris.Setup([sys.argv[0], *options, *given, *folders], target, custom_mutator=changed)
    atheris.Fuzz()
