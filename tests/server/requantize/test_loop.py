"""A requantized file goes through the whole loop: chosen by the command, scored, signed with how it was chosen, sent to live devices as a delta, tried there, committed."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import requantize_loop, update_loop
from benchmarks.requantize_loop import problems, summary
from benchmarks.update_loop import CHOSEN_FILE, INSTALLED_FILE, NEW_FILE, Ingredients
from protocol.ids import digest_of
from server.requantize.evaluation import quantize
from server.requantize.record import RECORD_SUFFIX, decode_record
from server.requantize.texts import RUN_TOKENS
from server.rollouts.states import RolloutState
from tests.models import write_language_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")

Q4_0, Q8_0_TYPE = 2, 8  # llama_ftype, ggml_type
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = {"calibration.txt": f"{LETTERS} 0123456789", "letters.txt": LETTERS, "digits.txt": "0123456789"}


def write_ingredients(folder: Path) -> Ingredients:
    """A float model, one that was changed a little from it, the first one quantized, and texts that share nothing."""
    before = write_language_model(folder / "v1.gguf", 1)
    write_language_model(folder / NEW_FILE, 1, noise=0.05)
    quantize(before, folder / INSTALLED_FILE, Q4_0, Q8_0_TYPE, 1)
    draws = np.random.default_rng(7)
    for name, letters in TEXTS.items():
        (folder / name).write_text("".join(draws.choice(list(letters), 4 * RUN_TOKENS + 100)))
    (folder / "golden.toml").write_text(
        "".join(
            f'[[prompt]]\nkind = "text"\nname = "{name}"\nprompt = "{name}"\ncompletion = "{completion}"\nlogprob_mean_min = {least}\n'
            for name, completion, least in (
                ("abc", "d", -12.0),
                ("012", "3", -12.0),
                ("no model", "xyz", 0.0),
            )
        )
    )
    return Ingredients(
        folder=folder,
        calibration="calibration.txt",
        held_out=("letters.txt", "digits.txt"),
        golden="golden.toml",
        budget="10%",
        devices=2,
        score_options=("--context", "512", "--memory-at", "64", "--drift-texts", "2", "--threads", "1"),
        requantize_options=("--runs", "8", "--workers", "1"),
        wait_s_max=180.0,
    )


def test_a_missing_model_is_named_with_what_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert requantize_loop.main(["--cache", str(tmp_path / "none"), "--work", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err
    assert "none/v2_large.bf16.gguf is missing" in error
    assert "`make requantize-pair`" in error
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_requantized_file_is_chosen_scored_signed_sent_as_a_delta_tried_and_committed(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    outcome = update_loop.run(write_ingredients(tmp_path), said.append)
    chosen, record = tmp_path / CHOSEN_FILE, tmp_path / f"{CHOSEN_FILE}{RECORD_SUFFIX}"
    assert outcome.file_sha256 == digest_of(chosen.read_bytes())
    assert problems(outcome) == []

    # Scored and signed, and the signed description says how the file was chosen.
    release = outcome.release
    assert release.record.published_ms is not None
    assert release.scorecard is not None
    assert release.scorecard.verdict == "passed"
    assert release.provenance is not None
    build, run = release.provenance.predicate.build_definition, release.provenance.predicate.run_details
    assert build.external_parameters["requantized"]["budget_bytes"] == int(0.1 * outcome.file_bytes)
    assert build.internal_parameters["guards"] == "5 passed"
    sources = {each.name: each.digest["sha256"] for each in build.resolved_dependencies}
    assert sources == {
        "new model": digest_of((tmp_path / NEW_FILE).read_bytes()),
        "installed file": digest_of((tmp_path / INSTALLED_FILE).read_bytes()),
    }
    kept = {each.name: each.digest["sha256"] for each in run.byproducts}
    assert kept == {
        "requantized": digest_of(record.read_bytes()),
        "scorecard": release.record.release.scorecard_sha256,
    }
    assert decode_record(record.read_bytes(), "record").sources.result == outcome.file_sha256

    # Sent as the delta that was promised, and nothing else: less than plain's, far less than the file.
    assert outcome.promised_bytes < outcome.plain_delta_bytes < outcome.file_bytes
    assert outcome.rollout.rollout.state is RolloutState.FINISHED
    assert outcome.rollout.counts == {"committed": 2}
    for device in outcome.devices:
        (fetched,) = device.fetched
        assert device.transfer_bytes == outcome.deltas[fetched] == outcome.promised_bytes
        assert device.full_bytes == outcome.file_bytes
        assert device.transfer_bytes < device.air_bytes < outcome.file_bytes
        assert (device.status, device.outcome, device.version) == ("committed", "committed", "v2")
        assert device.prompts == (2, 2)
        assert device.states_ms["trial"] > 0
        assert device.commit_ms is not None
        assert device.file_sha256 == outcome.file_sha256
    assert any(
        line.startswith("$ whimbrel requantize v2.bf16.gguf --installed v1.q4_0.gguf") for line in said
    )
    assert any("How it was chosen is signed with it" in line for line in said)
    assert any(line.startswith("device-1  committed  v2    2 of 2") for line in summary(outcome))
