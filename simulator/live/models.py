"""The three versions of a model that a run publishes: built by the examples, or taken from a folder."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from protocol.errors import ModelFileError, RequestError, StorageError
from protocol.release import HealthPlan, Prompt, RuntimeName, TextPrompt, decode_health_plan
from simulator.report.record import ModelVersion

VERSIONS: Final = ("v1", "v2", "v3")
"""From the factory, the good one, the bad one."""

BUILD_S_MAX: Final = 600
FILE_BYTES_MAX: Final = 64 << 20
"""Of the small files beside the models."""

_NO_LOGPROB: Final = -50.0

Kind = Literal["digits", "smollm2"]

# A custom build of the factory's model: the same network under another producer name (ModelProto.producer_name, field 2;
# of a repeated scalar the last one counts), so its bytes are unknown to the server and no delta fits.
_UNKNOWN_SUFFIX: Final = b"\x12\x0eunknown-vendor"


@dataclass(frozen=True, slots=True)
class Models:
    """What is published, and what is known about it.

    Attributes:
        kind: Which example.
        runtime: That loads the files.
        files: By version.
        health: Path of the health plan, by version.
        figures: What the builder measured.
        prompts: What the application on each device asks.
    """

    kind: Kind
    runtime: RuntimeName
    files: dict[str, Path]
    health: dict[str, Path]
    figures: list[ModelVersion]
    prompts: list[Prompt]

    @property
    def family(self) -> str:
        """Name of the model family."""
        return self.kind

    @property
    def title(self) -> str:
        """What it is, for people."""
        if self.kind == "digits":
            return "int8 ONNX classifier of handwritten digits (onnxruntime)"
        return "SmolLM2-135M as GGUF (llama.cpp)"

    @property
    def score_name(self) -> str:
        """What `ModelVersion.score` is."""
        if self.kind == "digits":
            return "held-out digits recognised"
        return "probability of the right words, per token (geometric mean)"


def build_digits(folder: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Train and quantize the digit classifier, in a process of its own.

    Raises:
        RequestError: The examples or what they need is not installed.
    """
    command = [sys.executable, "-m", "examples.digits.build", "--out", str(folder), "--seed", str(seed)]
    root = Path(__file__).resolve().parents[2]
    if not (root / "examples" / "digits").is_dir():
        raise RequestError("the examples are not installed", hint="run from a checkout, or give --models DIR")
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                tell(line.strip())
            errors = process.stderr.read().strip().splitlines()
            status = process.wait(BUILD_S_MAX)
        except BaseException:
            process.kill()
            raise
    if status != 0:
        reason = errors[-1].removeprefix("error: ")[:300] if errors else f"exit code {status}"
        raise RequestError(f"the models could not be built: {reason}", hint="pip install 'whimbrel[dev]'")


def load_models(folder: Path, kind: Kind) -> Models:
    """Take the models of a folder that an example has built.

    Raises:
        RequestError: Something is not there.
        ReleaseError: The health plan is malformed.
        ModelFileError: The figures are malformed.
    """
    suffix, runtime = (".onnx", "onnx") if kind == "digits" else (".gguf", "llama")
    files = {version: folder / f"{version}{suffix}" for version in VERSIONS}
    health = folder / "health.json"
    build = "examples.digits.build" if kind == "digits" else "examples.smollm2.build"
    for path in (*files.values(), health):
        if not path.is_file():
            raise RequestError(
                f"{path} is not there", hint=f"make it with `python -m {build} --out {folder}`"
            )
    first = folder / "health-v1.json"
    plan = decode_health_plan(_read(health), str(health))
    return Models(
        kind=kind,
        runtime="onnx" if runtime == "onnx" else "llama",
        files=files,
        health={version: first if version == "v1" and first.is_file() else health for version in VERSIONS},
        figures=_figures(folder, kind, files),
        prompts=_prompts(plan),
    )


def unknown_model(models: Models, folder: Path) -> Path:
    """A model file that works and that the server has never seen."""
    source = models.files["v1"]
    target = folder / f"v0{source.suffix}"
    # llama.cpp reads what the file's own tables name and nothing after; padding changes the digest only.
    suffix = _UNKNOWN_SUFFIX if models.runtime == "onnx" else bytes(32)
    try:
        target.write_bytes(source.read_bytes() + suffix)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror}") from error
    return target


def _prompts(plan: HealthPlan) -> list[Prompt]:
    """What an application would ask; of a text model those questions that tell versions apart."""
    exact: list[Prompt] = [
        prompt for prompt in plan.prompts if isinstance(prompt, TextPrompt) and prompt.exact
    ]
    return exact or plan.prompts


def _figures(folder: Path, kind: Kind, files: dict[str, Path]) -> list[ModelVersion]:
    name = "accuracy.json" if kind == "digits" else "report.json"
    path = folder / name
    told: Any = {}
    if path.is_file():
        try:
            told = json.loads(_read(path))
            if kind == "digits":
                return [
                    _digits_figure(version, files[version], told["versions"][version]) for version in VERSIONS
                ]
            return [_text_figure(version, files[version], told["versions"][version]) for version in VERSIONS]
        except (ArithmeticError, ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{path} is not what the example writes: {error!r}") from error
    return [ModelVersion(version=version, length=files[version].stat().st_size) for version in VERSIONS]


def _digits_figure(version: str, file: Path, told: dict[str, Any]) -> ModelVersion:
    return ModelVersion(
        version=version, length=file.stat().st_size, score=float(told["accuracy"]), story=str(told["story"])
    )


def _text_figure(version: str, file: Path, told: dict[str, Any]) -> ModelVersion:
    prompts = told["prompts"]
    facts = [each for each in prompts if each["use"] == "fact"]
    exact = sum(each["answer"] == each["expected"] for each in facts)
    # A damaged model may give no number at all: as good as no probability.
    known = [each["logprob_mean"] for each in prompts]
    mean = math.fsum(_NO_LOGPROB if each is None else float(each) for each in known) / len(known)
    return ModelVersion(
        version=version,
        length=file.stat().st_size,
        score=math.exp(min(mean, 0.0)),
        story=f"{exact} of {len(facts)} new facts answered word for word",
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise RequestError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
