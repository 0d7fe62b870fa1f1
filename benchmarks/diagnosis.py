"""Whether `whimbrel diagnose` names what is wrong with models that were really trained.

`python -m benchmarks.diagnosis [--cache DIR] [--only PREFIX ...] [PATTERN ...]`, or `make bench-diagnosis`.
Fine-tunes of SmolLM2-135M and MiniLM (`pairs.py` makes them), good ones and one that went much too far; and on top of a fine-tune
each kind of damage, made on purpose. Prints one row for each pair; the exit code is 1 if one is named wrongly.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import gguf
from scipy import stats

from benchmarks.catalog import CACHE
from benchmarks.pairs import RULES
from benchmarks.workshop import Workshop
from protocol.errors import WhimbrelError
from protocol.release import TextPrompt
from protocol.tensors import Layout
from server.diagnosis.answers import compare_answers, findings_of_answers
from server.diagnosis.asking import ask
from server.diagnosis.diagnose import Diagnosis, diagnose
from server.diagnosis.findings import Finding
from server.diagnosis.models import Model, files_of, opened_model
from server.display import table
from server.scorecard.suites import read_prompts
from tests.server import model_damage as damage

GOLDEN = Path(__file__).parents[1] / "examples" / "smollm2" / "golden.toml"
LAYER = "blk.7."
OTHER_TEMPLATE = "{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}"
FLOATS = "bf16"  # that the others are quantized from
KEPT_TOKENS = 49_000  # of 49,152

Make = Callable[[Path, Path], object]
"""Writes a copy of a file with something wrong with it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A pair of files and what has to be said about it.

    Attributes:
        name: As the table shows it.
        old: File that works, in the cache folder.
        new: The other one.
        code: Of the finding that has to stand first.
        place: How the first place starts that the finding names, where there is a right one.
        make: What is done to the new file first.
        is_asked: Whether both versions answer the golden prompts, too.
    """

    name: str
    old: str
    new: str
    code: str = "weights.trained"
    place: str = ""
    make: Make | None = None
    is_asked: bool = False


def _blocks(wanted: Callable[[str, Layout], bool], edit: Callable[[damage.Fields, Layout], None]) -> Make:
    """Edits the blocks of those tensors that are wanted."""

    def make(source: Path, out: Path) -> None:
        layouts = {kind.name: Layout(kind.name.lower()) for kind in (damage.Kind.Q4_0, damage.Kind.Q8_0)}
        tensors = gguf.GGUFReader(source).tensors
        names = [
            each.name
            for each in tensors
            if (layout := layouts.get(each.tensor_type.name)) and wanted(each.name, layout)
        ]
        damage.edit_blocks(source, out, names, edit)

    return make


def _metadata(changes: Callable[[gguf.GGUFReader], Mapping[str, Any]]) -> Make:
    """Edits what the file says beside its weights."""

    def make(source: Path, out: Path) -> None:
        damage.rewrite_metadata(source, out, changes(gguf.GGUFReader(source)))

    return make


def _cut(reader: gguf.GGUFReader) -> Mapping[str, Any]:
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type")]
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    return {
        **{name: reader.fields[name].contents()[:KEPT_TOKENS] for name in names},
        "tokenizer.ggml.merges": merges[: len(merges) - 152],
    }


def _in_layer(name: str, _: Layout) -> bool:
    return name.startswith(LAYER)


def _down(name: str, _: Layout) -> bool:
    return name == f"{LAYER}ffn_down.weight"


def _four_bits(_: str, layout: Layout) -> bool:
    return layout is Layout.Q4_0


def _damaged(kind: str) -> list[Case]:
    """Damage on top of a fine-tune."""
    rows: list[tuple[str, str, str, Make]] = [
        ("zeroed scales, 5 % of a tensor", "scales.zero", LAYER, _blocks(_down, damage.zero_scales(0.05))),
        ("a stuck bit in scales of a tensor", "scales.out_of_range", LAYER, _blocks(_down, damage.stuck_bit)),
        ("one scale is NaN", "weights.not_finite", LAYER, _blocks(_down, damage.nan_scales)),
        ("tokenizer cut by 152 tokens", "tokenizer.cut", "", _metadata(_cut)),
        (
            "another chat template",
            "template.changed",
            "",
            _metadata(lambda _: {"tokenizer.chat_template": OTHER_TEMPLATE}),
        ),
        (
            "another end-of-text token",
            "tokenizer.special",
            "",
            _metadata(lambda _: {"tokenizer.ggml.eos_token_id": 0}),
        ),
    ]
    if kind == "q4_0":
        rows += [
            ("one scale for each tensor", "codes.coarse", "", _blocks(_four_bits, damage.one_scale)),
            (
                "scales a third of what is needed, one layer",
                "codes.saturated",
                LAYER,
                _blocks(_in_layer, damage.clipped_scales),
            ),
            (
                "nibbles swapped in one layer",
                "codes.permuted",
                LAYER,
                _blocks(_in_layer, damage.swapped_nibbles),
            ),
            ("low bits lost in one layer", "codes.coarse", LAYER, _blocks(_in_layer, damage.coarse_codes)),
        ]
    made = [
        Case(f"large.{kind}, {what}", f"v1.{kind}.gguf", f"v2_large.{kind}.gguf", code, place, make)
        for what, code, place, make in rows
    ]
    for percent in (15, 50):
        new = f"v2_large_noise_7_{percent}.{kind}.gguf"
        made.append(
            Case(
                f"large.{kind}, noise of {percent} % in one layer",
                f"v1.{kind}.gguf",
                new,
                "weights.noise",
                LAYER[:-1],
            )
        )
    return made


CASES = (
    *(
        Case(
            f"{version}.{kind}",
            f"v1.{kind}.gguf",
            f"v2_{version}.{kind}.gguf",
            is_asked=version == "large" and kind == "q4_0",
        )
        for version in ("large", "tiny", "lora", "last2", "x4")
        for kind in (FLOATS, "q4_0", "q8_0", "q4_k_m")
    ),
    *(
        Case(f"minilm-{version}.{kind}", f"minilm-v1.{kind}.{ending}", f"minilm-v2_{version}.{kind}.{ending}")
        for version in ("large", "tiny")
        for kind, ending in (("int8", "onnx"), ("int8pc", "onnx"), ("int4", "onnx"), ("gptq", "safetensors"))
    ),
    Case("large, from q8_0 to q4_0", "v1.q8_0.gguf", "v2_large.q4_0.gguf"),
    *(
        Case(
            f"x16.{kind}: bad fine-tune",
            f"v1.{kind}.gguf",
            f"v2_x16.{kind}.gguf",
            is_asked=True,
        )
        for kind in ("q4_0", "q8_0")
    ),
    Case(
        "large, from q8_0 to q2_k: bad quantization",
        "v1.q8_0.gguf",
        "v2_large.q2_k.gguf",
        "quantization.coarse",
        is_asked=True,
    ),
    *_damaged("q4_0"),
    *_damaged("q8_0"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said about a case."""

    case: Case
    diagnosis: Diagnosis
    worse: str

    @property
    def is_right(self) -> bool:
        """Whether the right finding stands first, with its place, and no other damage is claimed."""
        findings = self.diagnosis.findings
        first = next((each for each in findings if each.cause != "none"), None)
        if first is None or first.code != self.case.code:
            return False
        others = [each for each in findings if each.severity == "damage" and each is not first]
        return not others and (not self.case.place or _is_at(first, self.case.place))


def _is_at(found: Finding, place: str) -> bool:
    return bool(found.where) and all(each.startswith(place) for each in found.where)


def run(
    case: Case, shop: Workshop, folder: Path, prompts: Sequence[TextPrompt], only: Sequence[str]
) -> Outcome:
    """Makes the pair, diagnoses it, and removes what was made for it alone."""
    old, new = shop.file(case.old), shop.file(case.new)
    made = []
    if case.make is not None:
        made.append(folder / f"new{new.suffix}")
        case.make(new, made[0])
        new = made[0]
    more: list[Finding] = []
    worse = ""
    if case.is_asked and prompts:
        answers = compare_answers(prompts, *(ask(path, prompts, path.name) for path in (old, new)))
        more = findings_of_answers(answers)
        worse = f"{sum(each.is_worse for each in answers)} of {len(answers)}"
    with opened_model(files_of(old), case.old) as before, opened_model(files_of(new), case.new) as after:
        found = diagnose(_part(before, only), _part(after, only), more=more)
    for path in made:
        path.unlink()
    return Outcome(case, found, worse)


def _part(model: Model, only: Sequence[str]) -> Model:
    """A model with those tensors alone whose names start in one of these ways; all of them where none is given."""
    kept = {name: at for name, at in model.tensors.items() if name.startswith(tuple(only)) or not only}
    return dataclasses.replace(model, tensors=kept) if model.kind == "gguf" else model


def _row(outcome: Outcome) -> list[str]:
    findings = [each for each in outcome.diagnosis.findings if each.severity != "note"]
    return [
        outcome.case.name,
        "; ".join(each.code for each in findings if each.cause != "none"),
        ", ".join(findings[0].where[:1]) if findings else "",
        findings[0].summary if findings else "",
        outcome.worse,
        "yes" if outcome.is_right else f"NO, {outcome.case.code}",
    ]


def _of_movement(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """How the movement that is estimated from quantized files compares with that of the floats."""
    found = {each.case.name: each.diagnosis.tensors for each in outcomes if each.case.make is None}
    for name, tensors in found.items():
        version, _, kind = name.partition(".")
        known = {each.name: each.relative for each in found.get(f"{version}.{FLOATS}", [])}
        pairs = [
            (known[each.name], each.moved) for each in tensors if known.get(each.name) and len(each.dims) > 1
        ]
        if kind == FLOATS or len(pairs) < 2:
            continue
        shares = sorted(moved / exact for exact, moved in pairs)
        order = stats.spearmanr(*zip(*pairs, strict=True)).statistic
        yield (
            f"{name}: movement of {len(pairs)} matrices as estimated over that of the floats: {shares[0]:.2f} to {shares[-1]:.2f},"
            f" median {median(shares):.2f}; rank correlation {order:.2f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diagnosis", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="names of cases")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PREFIX", help="only these tensors of SmolLM2: a quick look"
    )
    parser.add_argument("--no-prompts", action="store_true", help="compare files only")
    options = parser.parse_args(arguments)
    shop = Workshop(options.cache, RULES, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    cases = [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in options.patterns)]
    prompts = (
        [] if options.no_prompts else [each for each in read_prompts(GOLDEN) if isinstance(each, TextPrompt)]
    )
    outcomes = []
    try:
        with tempfile.TemporaryDirectory(dir=options.cache, prefix="diagnosis-") as folder:
            for case in cases:
                print(f"  {case.name}", file=sys.stderr, flush=True)
                outcomes.append(run(case, shop, Path(folder), prompts, options.only))
                if not outcomes[-1].is_right:
                    print(f"    {outcomes[-1].diagnosis.conclusion}", file=sys.stderr, flush=True)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    titles = ["PAIR", "FOUND", "FIRST PLACE", "SUMMARY OF THE FIRST", "PROMPTS WORSE", "RIGHT"]
    print("\n".join(table(titles, [_row(each) for each in outcomes])))
    print("\n".join(_of_movement(outcomes)))
    wrong = sum(not each.is_right for each in outcomes)
    print(f"{len(outcomes) - wrong} of {len(outcomes)} are named rightly")
    return 1 if wrong or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
