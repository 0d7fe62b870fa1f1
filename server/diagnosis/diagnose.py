"""Two versions of a model in, a diagnosis out: what changed, what was found, and what most likely happened."""

from collections.abc import Callable, Iterator

from msgspec import Struct

from protocol.errors import RequestError
from server.diagnosis.comparison import TensorChange, are_equal, compare_tensors
from server.diagnosis.findings import Finding, conclusion, finding, ordered
from server.diagnosis.metadata import compare_metadata
from server.diagnosis.models import Model
from server.diagnosis.rules import findings_of_tensors

Progress = Callable[[int, int], None]


class Diagnosis(Struct, frozen=True, kw_only=True):
    """Everything that is said about two versions of a model.

    Attributes:
        old: What the older one is called.
        new: What the newer one is called.
        conclusion: In words.
        findings: The likeliest explanation first.
        tensors: How each tensor that both have changed, in the order of the newer file.
    """

    old: str
    new: str
    conclusion: str
    findings: list[Finding]
    tensors: list[TensorChange]


def diagnose(
    old: Model,
    new: Model,
    *,
    more: list[Finding] | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Diagnosis:
    """Compare two open models.

    Args:
        old: The version that works.
        new: The version that is in question.
        more: What was found otherwise, by asking them.
        progress: Told how many bytes of how many are compared.

    Raises:
        RequestError: They are of different kinds, or have no tensor in common.
        ModelFileError: What was there when a file was opened cannot be read any more.
    """
    if old.kind != new.kind:
        raise RequestError(
            f"{old.label} is a {old.kind} file, and {new.label} a {new.kind} file",
            hint="compare versions of one kind: names and layouts of tensors differ otherwise",
        )
    common = [name for name in new.tensors if name in old.tensors]
    if not common:
        raise RequestError(
            f"{old.label} and {new.label} have no tensor name in common",
            hint="compare two versions of one model",
        )
    reshaped = [name for name in common if old.tensors[name][1].dims != new.tensors[name][1].dims]
    changes = list(_changes(old, new, [name for name in common if name not in set(reshaped)], progress))
    scale_names = {region.scales for _, region in new.tensors.values()}
    found = [
        *compare_metadata(old, new),
        *_of_names(old, new, reshaped),
        *findings_of_tensors(changes, scale_names),
        *_of_graph(old, new),
        *(more or []),
    ]
    findings = ordered(found)
    return Diagnosis(
        old=old.label, new=new.label, conclusion=conclusion(findings), findings=findings, tensors=changes
    )


def _changes(old: Model, new: Model, names: list[str], progress: Progress) -> Iterator[TensorChange]:
    total = sum(new.tensors[name][1].length for name in names)
    done = 0
    for name in names:
        yield compare_tensors(*old.tensors[name], *new.tensors[name])
        done += new.tensors[name][1].length
        progress(done, total)


def _of_names(old: Model, new: Model, reshaped: list[str]) -> Iterator[Finding]:
    missing = [name for name in old.tensors if name not in new.tensors]
    added = [name for name in new.tensors if name not in old.tensors]
    if missing:
        yield finding("tensors.missing", f"{len(missing)} of {len(old.tensors)} tensors are missing", missing)
    if reshaped:
        first = reshaped[0]
        shapes = [list(model.tensors[first][1].dims) for model in (old, new)]
        yield finding("tensors.reshaped", f"{first} has the shape {shapes[1]}, it was {shapes[0]}", reshaped)
    if added:
        yield finding("tensors.added", f"{len(added)} tensors are new", added)


def _of_graph(old: Model, new: Model) -> Iterator[Finding]:
    """Whether an ONNX model differs outside of the tensors that have a place of their own."""
    if new.kind != "onnx":
        return
    sides = [[(model.source, region) for region in model.other] for model in (old, new)]
    lengths = [sum(region.length for _, region in side) for side in sides]
    if lengths[0] != lengths[1] or not all(
        are_equal(*first, *second) for first, second in zip(*sides, strict=False)
    ):
        yield finding(
            "graph.changed",
            f"the graph with its smallest tensors has {lengths[1]} bytes, it had {lengths[0]}",
        )
