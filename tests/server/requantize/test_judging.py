"""From the command down to the file: what passes is written, what does not pass leaves nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import RequestError
from server.cli import main
from server.requantize import command as command_module
from server.requantize import fewest, rows
from server.requantize.evaluation import quantize
from server.requantize.guards import Margins
from server.requantize.model import sha256_of
from server.requantize.record import RECORD_SUFFIX
from server.requantize.request import Aim, Models, Questions, check_request
from server.requantize.texts import RUN_TOKENS, RUNS, Text
from tests.models import write_language_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")

Q4_0, Q8_0_TYPE = 2, 8  # llama_ftype, ggml_type
LOOSE = Margins(kl_share=10.0, flips=1.0)
"""What a file of random weights can keep to."""

HELD_OUT = ("letters.txt", "digits.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one trained on from it, the first one quantized, and four texts that share nothing."""
    made = tmp_path_factory.mktemp("judging")
    before = write_language_model(made / "before.gguf", 1)
    write_language_model(made / "new.gguf", 1, noise=0.2)
    quantize(before, made / "installed.gguf", Q4_0, Q8_0_TYPE, 1)
    draws = np.random.default_rng(7)
    for name, letters in (
        (HELD_OUT[0], "klmnop"),
        (HELD_OUT[1], "0123456789"),
    ):
        (made / name).write_text("".join(draws.choice(list(letters), 3 * RUN_TOKENS + 100)))
    for name in ("calibration.txt", "development.txt"):
        (made / name).write_text(written_by(made / "new.gguf", draws))
    (made / "golden.toml").write_text(
        '[[prompt]]\nkind = "text"\nname = "a"\nprompt = "abc"\ncompletion = "d"\nlogprob_mean_min = -50.0\n'
    )
    return made


def written_by(model: Path, draws: np.random.Generator) -> str:
    """Letters as a model draws them, so that the text is likelier to it than to any other."""
    import llama_cpp  # noqa: PLC0415 - after the check

    writer = llama_cpp.Llama(str(model), n_ctx=1024, n_threads=1, verbose=False)
    letters = np.arange(3 + ord("a"), 3 + ord("z") + 1)
    text: list[int] = []
    token = int(letters[0])
    for place in range(RUNS * RUN_TOKENS):
        if place % 1000 == 0:
            writer.reset()
        writer.eval([token])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(writer.ctx), shape=(writer.n_vocab(),))[
            letters
        ]
        shares = np.exp(logits - logits.max())
        token = int(draws.choice(letters, p=shares / shares.sum()))
        text.append(token - 3)
    writer.close()
    return bytes(text).decode()


def command(folder: Path, *options: str) -> list[str]:
    held_out = [part for name in HELD_OUT for part in ("--held-out", str(folder / name))]
    return [
        "requantize",
        str(folder / "new.gguf"),
        *("--installed", str(folder / "installed.gguf"), "--out", str(folder / "chosen.gguf")),
        *("--calibration", str(folder / "calibration.txt"), "--runs", "4", "--workers", "1"),
        *held_out,
        *options,
    ]


def test_a_file_that_is_no_worse_is_written_and_every_row_is_in_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    before = ("--before", str(folder / "before.gguf"), "--golden", str(folder / "golden.toml"))
    runs = ("--held-out-runs", "2")  # of three
    assert main([*command(folder, "--budget", "20%", *before, *runs), "--json", "--force"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == list(rows.NAMES)
    assert {check["status"] for check in found["checks"]} == {"passed"}
    assert [check["name"] for check in found["checks"]][-1] == "golden"
    sizes = {row["name"]: row["delta_bytes"] for row in found["rows"]}
    assert sizes["nothing sent"] == 0
    assert sizes["plain, embedding frozen"] < sizes["plain"]
    budget = 0.2 * (folder / "installed.gguf").stat().st_size
    assert all(0 < sizes[name] <= budget for name in ("chosen", "repair only", "minimum weight error"))
    for row in found["rows"]:
        assert set(row["texts"]) == set(HELD_OUT)
        assert {text["tokens"] for text in row["texts"].values()} == {2 * (RUN_TOKENS - 1)}
        assert all(
            text["kl"]["low"] <= text["kl"]["value"] <= text["kl"]["high"] for text in row["texts"].values()
        )
    assert (folder / "chosen.gguf").stat().st_size == (folder / "installed.gguf").stat().st_size
    assert not list(folder.glob(".requantize-*"))


def test_an_extrapolation_that_is_learned_is_judged_beside_controls_that_have_none(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    asked = ("--budget", "20%", "--afresh", "--learn-extrapolation", "1")
    before = ("--before", str(folder / "before.gguf"))
    assert main([*command(folder, *asked, *before), "--json", "--force"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == list(rows.NAMES)
    record = json.loads((folder / f"chosen.gguf{RECORD_SUFFIX}").read_text())
    assert record["settings"]["learned"] == 1
    assert record["settings"]["is_afresh"]
    assert record["sources"]["before"] == sha256_of(folder / "before.gguf")
    assert len(record["divergences"]) == 2


def test_a_file_that_is_worse_leaves_the_output_as_it_was_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "chosen.gguf"
    out.write_bytes(b"what was there")
    assert main([*command(folder, "--budget", "0.6%"), "--force"]) == 1
    assert out.read_bytes() == b"what was there"
    said = capsys.readouterr().out
    assert "is not written: " in said
    assert "FAILED" in said
    assert "against plain, allowed are" in said
    assert "repair only: the installed version in floats was not given (--before)" in said
    out.unlink()
    assert not list(folder.glob("*.partial*"))


def test_devices_that_have_another_file_get_a_row_a_guard_and_a_place_in_the_record(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    other = write_language_model(folder / "other.gguf", 1, noise=0.01)
    quantize(other, folder / "second.gguf", Q4_0, Q8_0_TYPE, 1)
    given = ("--also", f"{folder / 'second.gguf'}=0.25", "--budget", "20%", "--json", "--force")
    assert main(command(folder, *given)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]][:3] == [
        "nothing sent",
        "nothing sent, second.gguf",
        "plain",
    ]
    assert found["rows"][1]["delta_bytes"] == 0
    first, second = found["sent"]
    assert (first["share"], second["share"]) == (0.75, 0.25)
    sizes = {row["name"]: row["delta_bytes"] for row in found["rows"]}
    for row, key in (("chosen", "delta_bytes"), ("plain", "plain_bytes")):
        assert sizes[row] == round(0.75 * first[key] + 0.25 * second[key])
    checks = {check["name"]: check["status"] for check in found["checks"]}
    assert checks["bytes from installed.gguf"] == checks["bytes from second.gguf"] == "passed"
    record = json.loads((folder / "chosen.gguf.requantized.json").read_text())
    assert record["sent"] == found["sent"]
    assert all(each["alone_bytes"] > 0 for each in record["sent"])


def drawn(name: str, seed: int) -> Text:
    return Text(name, np.random.default_rng(seed).integers(3, 259, 2 * RUN_TOKENS).astype(np.int32))


def test_what_cannot_be_judged_is_refused_before_the_work(folder: Path) -> None:
    models = Models(folder / "new.gguf", folder / "installed.gguf")
    texts = (drawn("one", 1), drawn("two", 2))
    questions = Questions(drawn("calibration", 3), texts)
    with pytest.raises(RequestError, match="a budget or a share"):
        check_request(models, questions, Aim())
    with pytest.raises(RequestError, match="needs a text on which settings are tried"):
        check_request(models, questions, Aim(keep_share=0.9))
    with pytest.raises(RequestError, match="extrapolation needs the installed version in floats"):
        check_request(models, questions, Aim(budget_bytes=1, extrapolations=(0.5,)))
    with pytest.raises(
        RequestError, match="one has 64 tokens in a row, from token 0 on, that calibration has"
    ):
        check_request(models, Questions(Text("calibration", texts[0].tokens), texts), Aim(budget_bytes=1))
    development = Text("development", texts[1].tokens)
    with pytest.raises(RequestError, match="two has 64 tokens in a row"):
        check_request(models, Questions(drawn("calibration", 3), texts, development), Aim(budget_bytes=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "95%"], "--keep needs --development"),
        (["--keep", "95%", "--budget", "1%"], "contradict"),
        (["--unjudged"], "--unjudged and --held-out contradict"),
        (
            ["--force", "--learn-extrapolation", "2"],
            "--learn-extrapolation needs the installed version in floats",
        ),
        (
            ["--force", "--held-out-runs", "4"],
            "letters.txt has 3 runs of 512 tokens, --held-out-runs asks for 4",
        ),
        (["--force", "--afresh", "--start", "{}/installed.gguf"], "--afresh and --start contradict"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    folder: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, *(each.format(folder) for each in options))) == 1
    assert words in capsys.readouterr().err


def test_without_held_out_texts_nothing_is_written_unless_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = command(folder)[: -2 * len(HELD_OUT)]
    assert main(bare) == 1
    assert "no held-out text was given" in capsys.readouterr().err


def test_keeping_a_share_takes_the_fewest_bytes_that_do_on_the_development_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    monkeypatch.setattr(fewest, "RATIO", 2.0)  # few trials
    options = ("--keep", "40%", "--development", str(folder / "development.txt"), "--force", "--json")
    assert main(command(folder, *options)) == 0
    found = json.loads(capsys.readouterr().out)
    kept = next(row for row in found["rows"] if row["name"] == "chosen")
    plain = next(row for row in found["rows"] if row["name"] == "plain")
    assert kept["delta_bytes"] < plain["delta_bytes"]
    assert kept["note"].startswith("the fewest bytes that keep 40 % on the development text")
