"""`whimbrel diagnose OLD NEW`: what is different between two versions of a model, and what most likely happened."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import EngineError, ModelFileError, RequestError
from protocol.ids import Digest
from protocol.release import ClassPrompt, HealthPlan, TextPrompt, decode_health_plan
from server import operations
from server.diagnosis.answers import Divergence, compare_answers, findings_of_answers, told
from server.diagnosis.asking import ask, ask_classifier
from server.diagnosis.classes import Shift, compare_classes, findings_of_classes, told_class
from server.diagnosis.comparison import TensorChange
from server.diagnosis.diagnose import Diagnosis, diagnose
from server.diagnosis.findings import MEANINGS, Finding, finding
from server.diagnosis.models import Model, files_of, laid_out, opened_model
from server.display import Printer, table
from server.home import BLOBS_FOLDER, opened

_TENSORS_SHOWN: Final = 12
_PROMPTS_SHOWN: Final = 8


def add_parser(commands: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """Register `diagnose`.

    Args:
        commands: Of the `whimbrel` command.
        common: Options of the commands that work on a server's folder.
        show: Prints a value or lines.
    """
    parser = commands.add_parser(
        "diagnose",
        parents=[common],
        help="say what changed between two versions of a model, and what went wrong",
        usage="whimbrel diagnose [options] OLD NEW | FAMILY OLD_VERSION NEW_VERSION",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="two files (GGUF, ONNX, safetensors), or a family and two of its versions",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="HEALTH.json",
        help="ask both versions the prompts of this health plan (needs llama-cpp-python or onnxruntime); versions have one of their own",
    )
    parser.add_argument("--no-prompts", action="store_true", help="compare files only")
    parser.set_defaults(run=lambda arguments: _run(arguments, show))


def _run(arguments: argparse.Namespace, show: Printer) -> int:
    with ExitStack() as stack:
        sides, plan = _sides(arguments)
        old, new = (stack.enter_context(opened_model(files, label)) for label, files in sides)
        answers: list[Divergence] | list[Shift] = []
        more: list[Finding] = []
        if not arguments.no_prompts:
            answers, more = _asked(old, new, _plan(plan, arguments.prompts), arguments.prompts)
        found = diagnose(old, new, more=more, progress=_progress(arguments))
    value = {
        **msgspec.to_builtins(found),
        "tensors": [_tensor_json(each) for each in found.tensors if not each.is_identical],
        "tensors_compared": len(found.tensors),
        "prompts": msgspec.to_builtins(answers),
    }
    show(arguments, value, [_plain(line) for line in _lines(found, answers)])
    return 0


def _sides(arguments: argparse.Namespace) -> tuple[list[tuple[str, dict[str, Path]]], HealthPlan | None]:
    """Both models with their files, and the health plan of the newer one if it is a release."""
    names: list[str] = arguments.models
    if len(names) == 2:
        return [(name, files_of(Path(name))) for name in names], None
    if len(names) == 3:
        family, *versions = names
        return _releases(arguments.dir, [(family, version) for version in versions])
    if len(names) == 4:
        return _releases(arguments.dir, [(names[0], names[1]), (names[2], names[3])])
    raise RequestError(
        f"{len(names)} name(s) given",
        hint="give two files, or a family and two versions: OLD NEW | FAMILY OLD NEW",
    )


def _releases(
    folder: Path, pairs: list[tuple[str, str]]
) -> tuple[list[tuple[str, dict[str, Path]]], HealthPlan | None]:
    sides: list[tuple[str, dict[str, Path]]] = []
    plan: HealthPlan | None = None
    for family, version in pairs:
        release = operations.show_release(folder, family, version).record.release
        if release.adapter is not None:
            raise RequestError(
                f"{family} {version} has the adapter {release.adapter.name}: what it changes is not diagnosed",
                hint="merge it into the model and diagnose two files; `whimbrel score` compares the answers",
            )
        with opened(folder) as home:
            files = {file.name: home.blobs.path(Digest(file.sha256)) for file in release.files}
        missing = [name for name, path in files.items() if not path.is_file()]
        if missing:
            raise RequestError(
                f"{folder / BLOBS_FOLDER} does not hold {missing[0]}", hint="add the release again"
            )
        sides.append((f"{family} {version}", files))
        plan = release.health
    return sides, plan


def _plan(plan: HealthPlan | None, file: Path | None) -> HealthPlan | None:
    """The health plan that is asked: that of a file, or the one of the release."""
    if file is None:
        return plan
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}", hint="give a health plan that can be read") from error
    return decode_health_plan(data, str(file))


def _asked(
    old: Model, new: Model, plan: HealthPlan | None, file: Path | None
) -> tuple[list[Divergence] | list[Shift], list[Finding]]:
    """What both versions answer to the prompts of their kind; nothing where there are none."""
    given = [] if plan is None else plan.prompts
    texts = [prompt for prompt in given if isinstance(prompt, TextPrompt)]
    inputs = [prompt for prompt in given if isinstance(prompt, ClassPrompt)]
    wanted = {"gguf": "text", "onnx": "class"}.get(new.kind)
    if file is not None and not (texts if wanted == "text" else inputs if wanted else []):
        raise RequestError(
            f"{file} has no prompts of kind {wanted}"
            if wanted
            else f"{new.label} is a {new.kind} file, which no runtime answers from",
            hint="give the health plan of such a model, or leave out --prompts",
        )
    if old.kind != new.kind:
        return [], []  # which `diagnose` refuses
    if wanted == "text" and texts:
        return _asked_texts(old, new, texts)
    if wanted == "class" and inputs:
        return _asked_inputs(old, new, inputs)
    return [], []


def _asked_texts(old: Model, new: Model, prompts: list[TextPrompt]) -> tuple[list[Divergence], list[Finding]]:
    before = ask(old.path, prompts, old.label)
    try:
        after = ask(new.path, prompts, new.label)
    except ModelFileError as error:
        return [], [finding("prompts.unanswered", error.message, [prompt.name for prompt in prompts])]
    divergences = compare_answers(prompts, before, after)
    return divergences, findings_of_answers(divergences)


def _asked_inputs(old: Model, new: Model, prompts: list[ClassPrompt]) -> tuple[list[Shift], list[Finding]]:
    with laid_out(old) as path:
        before = ask_classifier(path, prompts, old.label)
    try:
        with laid_out(new) as path:
            after = ask_classifier(path, prompts, new.label)
    except EngineError as error:
        return [], [finding("prompts.unanswered", error.message, [prompt.name for prompt in prompts])]
    shifts = compare_classes(prompts, before, after)
    return shifts, findings_of_classes(shifts)


def _progress(arguments: argparse.Namespace) -> Any:
    is_shown = not arguments.json and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if is_shown:
            end = "\r\x1b[K" if done == total else ""
            sys.stderr.write(f"\rcomparing {100 * done // max(1, total):3d} %{end}")
            sys.stderr.flush()

    return progress


def _lines(found: Diagnosis, answers: list[Divergence] | list[Shift]) -> Iterator[str]:
    yield found.conclusion
    yield ""
    for each in found.findings:
        yield f"{each.severity:<8}{each.code:<24}{each.summary}"
        if each.where:
            more = f" and {each.count - len(each.where[:3])} more" if each.count > len(each.where[:3]) else ""
            yield f"{'':<32}in {', '.join(each.where[:3])}{more}"
        if each.severity != "note" and MEANINGS[each.code].advice:
            yield f"{'':<32}{MEANINGS[each.code].advice}"
    changed = [each for each in found.tensors if not each.is_identical]
    yield f"Tensors: {len(changed)} of {len(found.tensors)} changed"
    ranked = sorted(changed, key=lambda each: (-each.moved, -each.relative))[:_TENSORS_SHOWN]
    yield from table(
        ["TENSOR", "LAYOUT", "CHANGE", "MOVED", "COSINE", "GAIN", "OF ROUNDING", "DAMAGED BLOCKS"],
        [_row(each) for each in ranked],
    )
    if answers:
        yield f"Prompts: {sum(each.is_worse for each in answers)} of {len(answers)} worse"
    told_of: list[Divergence | Shift] = [each for each in answers if each.is_worse or each.is_other]
    for answer in sorted(told_of, key=lambda each: not each.is_worse)[:_PROMPTS_SHOWN]:
        yield f"  {told_class(answer) if isinstance(answer, Shift) else told(answer)}"


def _plain(line: str) -> str:
    """Whoever named a tensor does not get to move the cursor of whoever reads it."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _row(change: TensorChange) -> list[str]:
    layouts = [change.old_layout.value, change.new_layout.value]
    blocks = change.blocks
    damaged = blocks.not_finite + blocks.lost_scale + blocks.dead + blocks.resized
    return [
        change.name,
        " to ".join(dict.fromkeys(layouts)),
        f"{100 * change.relative:.3g} %",
        f"{100 * change.moved:.3g} %",
        f"{change.cosine:.4f}",
        f"{change.gain:.3f}",
        f"{change.rounding:.2f}" if change.rounding < 1e6 else "-",
        f"{damaged} of {blocks.count}" if damaged else "-",
    ]


def _tensor_json(change: TensorChange) -> dict[str, Any]:
    """JSON has no infinity: what has no grid to be rounded to has no number there."""
    value: Mapping[str, Any] = msgspec.to_builtins(change)
    return {
        name: None if isinstance(each, float) and abs(each) == float("inf") else each
        for name, each in value.items()
    }
