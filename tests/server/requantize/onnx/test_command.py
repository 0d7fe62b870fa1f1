"""From the command down to the file: ONNX is recognized, what passes is written, what does not pass leaves nothing."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocol.errors import WhimbrelError
from server.cli import main
from server.requantize.guards import Margins
from server.requantize.onnx import command as command_module
from server.requantize.onnx import verdict
from server.requantize.onnx.calibration import Calibration, calibrate
from server.requantize.onnx.choice import Settings, choose
from server.requantize.onnx.distortion import answers_of, distortions
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.judging import Aim, Models, Questions, check_request
from server.requantize.onnx.matrices import find_floats, find_matrices
from server.requantize.onnx.orders import Asked
from server.requantize.record import decode_record
from server.requantize.weighing import delta_bytes
from tests.models import FEATURES, prompts, write_classifier
from tests.server.requantize.onnx import models

pytest.importorskip("onnxruntime")

ASKED = Asked(kind="classes", output="scores", mask="mask")
LOOSE = Margins(kl_share=1e4, flips=1.0)
"""What a file of random weights can keep to."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one trained on from it, the first one quantized, and sets of samples that share none."""
    made = tmp_path_factory.mktemp("onnx")
    before = models.write_model(made / "before.onnx")
    new = models.write_model(made / "new.onnx", noise=0.05)
    models.write_dynamic(before, made / "int8.onnx")
    models.write_int4(before, made / "int4.onnx")
    models.write_int4(new, made / "plain4.onnx")
    for number, name in enumerate(("calibration.npz", "one.npz", "two.npz", "development.npz")):
        models.written(made, models.drawn(name, number))
    return made


def calibrated(folder: Path, installed: Graph) -> Calibration:
    new = Graph(folder / "new.onnx")
    samples = models.drawn("calibration.npz", 0)
    matrices, floats = find_matrices(new, installed)[0], find_floats(new, installed)
    return calibrate(
        new, installed, matrices, floats, samples, ASKED, folder / "calibration", lambda _line: None
    )


def loss(folder: Path, path: Path) -> float:
    """Mean divergence from the new model on samples that nothing was decided on."""
    samples = models.drawn("unseen", 9)
    both = [
        answers_of("classes", models.run(each, samples), samples.arrays["mask"])
        for each in (folder / "new.onnx", path)
    ]
    return float(distortions("classes", *both).mean())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_only_codes_and_floats_change_within_the_budget_and_the_answers_come_nearer(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    new, installed = Graph(folder / "new.onnx"), Graph(folder / f"{kind}.onnx")
    calibration = calibrated(folder, installed)
    assert all(each.effect > 0 for each in calibration.worths.values())
    settings = Settings(budget_bytes=installed.length // 5, workers=1)
    out = tmp_path / "out.onnx"
    chosen = choose(new, installed, calibration, settings, out, lambda _line: None)
    assert chosen.delta_bytes == delta_bytes(installed.path, out) <= installed.length // 5
    assert loss(folder, out) < 0.7 * loss(folder, installed.path)
    assert chosen.objective_after < chosen.objective_before

    old, made = (np.frombuffer(path.read_bytes(), np.uint8) for path in (installed.path, out))
    allowed = np.zeros(len(old), np.bool_)
    for matrix in find_matrices(new, installed)[0]:
        allowed[matrix.offset : matrix.offset + matrix.form.length] = True
    for tensor in find_floats(new, installed):
        allowed[tensor.offset : tensor.offset + new.array(tensor.name).nbytes] = True
    assert len(made) == len(old)
    assert not (old != made)[~allowed].any()
    after = find_matrices(new, Graph(out))[0]
    for matrix, theirs in zip(find_matrices(new, installed)[0], after, strict=True):
        first, second = (
            each.form.codes(each.installed(graph)).astype(int)
            for each, graph in ((matrix, installed), (theirs, Graph(out)))
        )
        assert chosen.changed[matrix.name] == np.count_nonzero(first != second)
        low, high = matrix.form.range(first)
        assert low <= second.min() <= second.max() <= high

    again = tmp_path / "again.onnx"
    settings = Settings(price=chosen.price, workers=1)
    choose(new, installed, calibration, settings, again, lambda _line: None)
    assert again.read_bytes() == out.read_bytes()


def command(folder: Path, installed: str, *options: str) -> list[str]:
    held_out = [part for name in ("one.npz", "two.npz") for part in ("--held-out", str(folder / name))]
    return [
        "requantize",
        str(folder / "new.onnx"),
        *("--installed", str(folder / installed), "--out", str(folder / "chosen.onnx")),
        *("--calibration", str(folder / "calibration.npz"), "--workers", "1"),
        *("--output-kind", "classes", "--output", "scores", "--mask", "mask"),
        *held_out,
        *options,
    ]


def test_a_file_that_is_no_worse_is_written_and_every_row_is_in_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    options = ("--budget", "20%", "--before", str(folder / "before.onnx"), "--json", "--force")
    assert main(command(folder, "int8.onnx", *options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == list(verdict.NAMES)
    assert {check["status"] for check in found["checks"]} == {"passed"}
    assert len(found["checks"]) == 4
    sizes = {row["name"]: row["delta_bytes"] for row in found["rows"]}
    losses = {row["name"]: row["sets"]["one.npz"]["distortion"]["value"] for row in found["rows"]}
    assert sizes["nothing sent"] == 0
    assert all(
        0 < sizes[name] <= sizes["plain"] for name in ("chosen", "repair only", "minimum weight error")
    )
    assert losses["plain"] < losses["chosen"] < losses["repair only"]
    assert losses["chosen"] < losses["nothing sent"]
    assert loss(folder, folder / "chosen.onnx") < loss(folder, folder / "int8.onnx")
    record = decode_record((folder / "chosen.onnx.requantized.json").read_bytes(), "record")
    assert record.sources.result == Graph(folder / "chosen.onnx").sha256
    assert record.sources.samples is not None  # so that a release says on what it was calibrated
    assert [guard.status for guard in record.guards or ()] == ["passed"] * 4
    assert not list(folder.glob(".requantize-*"))


def test_a_file_that_is_worse_leaves_the_output_as_it_was_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "chosen.onnx"
    out.write_bytes(b"what was there")
    options = ("--budget", "0.8%", "--plain", str(folder / "plain4.onnx"), "--force")
    assert main(command(folder, "int4.onnx", *options)) == 1
    assert out.read_bytes() == b"what was there"
    said = capsys.readouterr().out
    assert "is not written: " in said
    assert "FAILED" in said
    assert "% of plain's distortion" in said
    out.unlink()


@pytest.mark.slow
def test_as_few_bytes_as_keep_a_share_of_the_gain(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    options = ("--keep", "60%", "--development", str(folder / "development.npz"), "--json", "--force")
    assert main(command(folder, "int8.onnx", *options)) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["chosen"]["delta_bytes"] < rows["plain"]["delta_bytes"]
    assert 0.5 < rows["chosen"]["sets"]["one.npz"]["gain"]["value"] < 1


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--output-kind", "classes", "--output", "nothing"), "has no output nothing"),
        (("--mask", "nothing"), "has no nothing, which --mask names"),
        (("--plain", "before.onnx"), "not the tensors of"),
        (("--start", "before.onnx"), "--start is for GGUF files"),
        (("--move-scales",), "--move-scales is for GGUF files"),
        (("--distill", "8"), "--distill is for GGUF files"),
        (("--afresh",), "--afresh is for GGUF files"),
        (("--learn-extrapolation", "2"), "--learn-extrapolation is for GGUF files"),
        (("--before", "int8.onnx"), "has no floats embedding of the shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_clear_error(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], what: str
) -> None:
    given = [str(folder / each) if each.endswith(".onnx") else each for each in options]
    assert main([*command(folder, "int8.onnx"), *given, "--force"]) == 1
    assert what in capsys.readouterr().err


def test_a_plain_file_that_cannot_be_made_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(folder, "int4.onnx"), "--force"]) == 1
    said = capsys.readouterr().err
    assert "no dynamic quantization of matrix products" in said
    assert "--plain" in said


def test_sets_that_share_samples_or_are_too_small_are_refused_before_the_work(folder: Path) -> None:
    both = Models(Graph(folder / "new.onnx"), Graph(folder / "int8.onnx"))
    aim = Aim(budget_bytes=1)
    sets = [models.drawn(name, number) for number, name in enumerate(("a", "b", "c"))]

    def refused(questions: Questions, aim: Aim = aim) -> str:
        with pytest.raises(WhimbrelError) as caught:
            check_request(both, questions, aim, ASKED)
        return caught.value.message

    check_request(both, Questions(sets[0], (sets[1], sets[2])), aim, ASKED)
    twin = models.drawn("twin", 1)
    assert refused(Questions(sets[0], (sets[1], twin))) == "sample 0 of twin is sample 0 of b"
    assert refused(Questions(twin, (sets[1], sets[2]))) == "sample 0 of b is sample 0 of twin"
    assert refused(Questions(sets[0], (sets[1],))) == "1 held-out set(s), 2 are needed"
    assert (
        refused(Questions(sets[0], (sets[1], models.drawn("few", 5, 8))))
        == "few has 8 samples, 32 are needed"
    )
    assert "needs samples on which settings are tried" in refused(
        Questions(sets[0], (sets[1], sets[2])), Aim(keep_share=0.5)
    )


def test_a_classifier_is_judged_on_lines_of_a_suite_and_on_golden_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    old = write_classifier(tmp_path / "old.onnx", seed=1)
    new = write_classifier(tmp_path / "new.onnx", seed=2)
    models.write_dynamic(old, tmp_path / "installed.onnx")
    draws = np.random.default_rng(1)
    for name in ("calibration", "one", "two"):
        rows = draws.normal(0, 1, (40, FEATURES)).round(3).tolist()
        lines = (json.dumps({"input": row, "label": 0}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    golden = tmp_path / "golden.jsonl"
    golden.write_bytes(b"\n".join(msgspec.json.encode(prompt) for prompt in prompts()))
    options = [
        *(
            "requantize",
            str(new),
            "--installed",
            str(tmp_path / "installed.onnx"),
            "--out",
            str(tmp_path / "out.onnx"),
        ),
        *(
            "--calibration",
            str(tmp_path / "calibration.jsonl"),
            "--output-kind",
            "classes",
            "--budget",
            "40%",
        ),
        *("--held-out", str(tmp_path / "one.jsonl"), "--held-out", str(tmp_path / "two.jsonl")),
        *("--golden", str(golden), "--json"),
    ]
    assert main(options) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [(each["name"], each["status"]) for each in checks][-1] == ("golden", "passed")
    assert checks[-1]["detail"] == "8 of the 8 prompts that plain answers as it has to"
