"""Readings beside the same figures computed from llama-cpp-python's own class, which shares no code with the evaluation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from protocol.errors import EngineError
from server.requantize import evaluation
from server.requantize.controls import write_frozen, write_plain
from server.requantize.evaluation import Evaluator, quantize
from server.requantize.model import EMBEDDING, opened_gguf
from server.requantize.texts import RUN_TOKENS, Text
from server.requantize.weighing import delta_bytes
from tests.models import write_language_model
from tests.server.scorecard.test_scoring_texts import Independent

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")

Q4_0 = 2  # llama_ftype
Q8_0_TYPE = 8  # ggml_type
TOLERANCE = 0.05
"""As in `test_scoring_texts`: keys and values have 16 bits."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "before": write_language_model(folder / "before.gguf", 1),
        "new": write_language_model(folder / "new.gguf", 1, noise=0.05),
    }
    made["installed"] = folder / "installed.gguf"
    quantize(made["before"], made["installed"], Q4_0, Q8_0_TYPE, 1)
    return made


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("letters", np.random.default_rng(4).integers(3, 259, 2 * RUN_TOKENS).astype(np.int32))


def silent(_done: int, _total: int, _what: str) -> None:
    """Somebody who does not look."""


def test_a_reading_is_what_another_evaluation_finds(
    files: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    with Evaluator(files["new"], [text], tmp_path, 1, silent) as evaluator:
        found = evaluator.measure(files["installed"])["letters"]
    reference, candidate = Independent(files["new"]), Independent(files["installed"])
    count = 40
    run = text.runs()[1]
    theirs, ours = (each.logprobs(run[:count].tolist()) for each in (reference, candidate))
    reference.close()
    candidate.close()
    place = slice(RUN_TOKENS - 1, RUN_TOKENS - 1 + count)
    assert found.nll[place] == pytest.approx(-ours[np.arange(count), run[1 : count + 1]], abs=TOLERANCE)
    assert found.kl[place] == pytest.approx(
        special.rel_entr(np.exp(theirs), np.exp(ours)).sum(axis=1), abs=TOLERANCE
    )
    same = theirs.argmax(axis=1) == ours.argmax(axis=1)
    assert np.mean(np.array(found.same[place]) == same) > 0.9
    assert len(found.nll) == len(found.kl) == len(found.same) == 2 * (RUN_TOKENS - 1)


def test_the_float_model_has_no_distance_from_itself(
    files: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    with Evaluator(files["new"], [text], tmp_path, 1, silent) as evaluator:
        found = evaluator.measure(files["new"])["letters"]
    assert all(found.same)
    assert np.mean(found.kl) < 1e-5  # what 16 bits of a log-probability leave


def test_what_was_measured_is_not_measured_again(files: dict[str, Path], text: Text, tmp_path: Path) -> None:
    told: list[str] = []
    with Evaluator(files["new"], [text], tmp_path, 1, lambda _d, _t, what: told.append(what)) as evaluator:
        first = evaluator.measure(files["installed"])
        assert told
        told.clear()
    with Evaluator(files["new"], [text], tmp_path, 1, lambda _d, _t, what: told.append(what)) as evaluator:
        copy = shutil.copyfile(files["installed"], tmp_path / "other-name.gguf")
        assert evaluator.measure(copy) == first
        assert not told
        evaluator.measure(files["before"])
        assert told  # another file


def test_predictions_that_were_not_used_for_long_make_room(
    files: dict[str, Path], text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 2 * 2 * (RUN_TOKENS - 1) * 264
    monkeypatch.setattr(evaluation, "REFERENCES_BYTES_MAX", int(1.5 * one))
    for seed in (1, 2):
        other = Text(f"text {seed}", np.roll(text.tokens, seed))
        with Evaluator(files["new"], [other], tmp_path, 1, silent) as evaluator:
            evaluator.measure(files["installed"])
        assert len(list(tmp_path.glob("reference-*"))) == len(list(tmp_path.glob("likeliest-*"))) == 1


def test_a_model_with_other_tokens_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    wild = Text("wild", np.full(2 * RUN_TOKENS, 5000, np.int32))
    with (
        Evaluator(files["new"], [wild], tmp_path, 1, silent) as evaluator,
        pytest.raises(EngineError, match="a token is not among the 264 of the vocabulary"),
    ):
        evaluator.measure(files["installed"])


def test_plain_is_what_llama_cpp_makes_of_the_new_model_and_frozen_keeps_the_embedding(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plain, frozen, direct = (tmp_path / f"{name}.gguf" for name in ("plain", "frozen", "direct"))
    write_plain(files["new"], files["installed"], plain, 1)
    quantize(files["new"], direct, Q4_0, Q8_0_TYPE, 1)
    assert plain.read_bytes() == direct.read_bytes()
    write_frozen(plain, files["installed"], frozen)
    with opened_gguf(plain) as new, opened_gguf(frozen) as made, opened_gguf(files["installed"]) as old:
        for name in new.tensors:
            source = old if name == EMBEDDING else new
            theirs = [each.source.read_at(*_place(each, name)) for each in (made, source)]
            assert theirs[0] == theirs[1]
    assert delta_bytes(files["installed"], frozen) < delta_bytes(files["installed"], plain)
    assert not list(tmp_path.glob(".partial*"))


def _place(file: object, name: str) -> tuple[int, int]:
    region = file.tensors[name]  # type: ignore[attr-defined]  # a `ModelFile`
    return region.offset, region.length
