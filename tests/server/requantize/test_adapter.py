"""Adapters as candidates: made of two models, packed, measured beside the chosen file, written only if they pass."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.gguf_files import read_weights
from protocol.errors import ModelFileError, RequestError
from server.cli import main
from server.releases.adapter_files import DOWN, UP
from server.requantize import command as command_module
from server.requantize.adapter_file import pack, q8_0, write_packed
from server.requantize.calibration import Calibration, calibrate
from server.requantize.evaluation import Evaluator, quantize
from server.requantize.factors import factors, write_factored
from server.requantize.texts import RUN_TOKENS, Text
from tests.adapters import MATRICES, RANK, adapter_parts, write_adapter, write_merged, write_parts
from tests.models import write_language_model
from tests.server.requantize.samples import tokens
from tests.server.requantize.test_evaluation import silent
from tests.server.requantize.test_judging import HELD_OUT, LOOSE, command

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")

Q4_0, Q8_0_TYPE = 2, 8  # llama_ftype, ggml_type
KEY = "blk.0.attn_k.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, that with an adapter merged into it, the first one quantized, texts that share nothing."""
    made = tmp_path_factory.mktemp("adapter")
    before = write_language_model(made / "before.gguf", 1)
    adapter = write_adapter(made / "lora.gguf", before, 1, size=0.7)
    write_merged(made / "new.gguf", before, adapter)
    quantize(before, made / "installed.gguf", Q4_0, Q8_0_TYPE, 1)
    draws = np.random.default_rng(7)
    for name, letters in zip((*HELD_OUT, "calibration.txt"), ("klmnop", "0123456789", "abcdef"), strict=True):
        (made / name).write_text("".join(draws.choice(list(letters), 2 * RUN_TOKENS + 100)))
    (made / "golden.toml").write_text(
        '[[prompt]]\nkind = "text"\nname = "a"\nprompt = "abc"\ncompletion = "d"\nlogprob_mean_min = -50.0\n'
    )
    return made


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return calibrate(
        folder / "new.gguf", tokens(3), folder / "calibration", silent_report, sequences=2, workers=1
    )


def silent_report(_line: str) -> None:
    """Somebody who does not look."""


def test_factors_are_the_best_of_their_rank_in_the_metric() -> None:
    rng = np.random.default_rng(1)
    change, seen = rng.normal(0, 1, (24, 16)), rng.normal(0, 1, (64, 16)) * np.geomspace(1, 30, 16)
    inputs, outputs = seen.T @ seen / 64, rng.gamma(1.0, 1.0, 24)

    def cost(error: np.ndarray) -> float:
        return float(np.einsum("i,ij,jk,ik->", outputs, error, inputs, error))

    down, up = factors(change, inputs, outputs, 3)
    assert (down.shape, up.shape) == ((3, 16), (24, 3))
    rooted = np.sqrt(outputs)[:, None] * change @ np.linalg.cholesky(inputs)
    lost = np.square(np.linalg.svd(rooted, compute_uv=False)[3:]).sum()
    assert cost(change - up @ down) == pytest.approx(lost, rel=1e-4)
    left, sizes, right = np.linalg.svd(change)
    assert cost(change - up @ down) < 0.9 * cost(change - (left[:, :3] * sizes[:3]) @ right[:3])
    assert np.linalg.norm(down, axis=1) == pytest.approx(np.linalg.norm(up, axis=0), rel=1e-4)


def test_a_change_of_that_rank_is_found_again_whatever_the_metric() -> None:
    rng = np.random.default_rng(2)
    change = rng.normal(0, 1, (24, 3)) @ rng.normal(0, 1, (3, 16))
    seen = rng.normal(0, 1, (64, 16))
    down, up = factors(change, seen.T @ seen, rng.gamma(1.0, 1.0, 24), 3)
    assert up @ down == pytest.approx(change, abs=1e-4)


def test_blocks_of_eight_bits_are_those_of_the_reference() -> None:
    values = np.random.default_rng(3).normal(0, 1, (4, 96)).astype(np.float32)
    values[1, 32:64] = 0
    assert q8_0(values) == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_a_packed_adapter_is_half_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    given, packed = folder / "lora.gguf", tmp_path / "packed.gguf"
    pack(given, packed)
    assert packed.stat().st_size < 0.6 * given.stat().st_size
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(packed).tensors}
    assert {kinds[f"{MATRICES[0]}{DOWN}"], kinds[f"{MATRICES[0]}{UP}"]} == {"Q8_0", "F16"}
    before, after = read_weights(given), read_weights(packed)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.abs(after[name] - values).max() < 0.02 * np.abs(values).max()
    text = Text("letters", tokens(4, 2 * RUN_TOKENS))
    with Evaluator(folder / "new.gguf", [text], tmp_path / "readings", 1, silent) as evaluator:
        readings = [evaluator.measure(folder / "before.gguf", None, each) for each in (given, packed)]
        alone = evaluator.measure(folder / "before.gguf")
    distances = [float(np.mean(each["letters"].kl)) for each in (*readings, alone)]
    assert distances[0] < 1e-4
    assert distances[1] < 1e-3
    assert distances[2] > 0.1  # the journal of a file with an adapter is another one


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_factors_that_sixteen_bits_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    parts = {f"{KEY}{DOWN}": np.ones((2, 32), np.float32), f"{KEY}{UP}": np.full((8, 2), value, np.float32)}
    with pytest.raises(ModelFileError, match=r"attn_k\.weight\.lora_b has numbers that 16 bits cannot hold"):
        write_packed(tmp_path / "out.gguf", "llama", 1.0, parts)
    assert not list(tmp_path.iterdir())


def test_the_adapter_of_two_models_leads_from_one_to_the_other(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    text = Text("letters", tokens(5, 2 * RUN_TOKENS))
    distances = []
    with Evaluator(folder / "new.gguf", [text], tmp_path / "readings", 1, silent) as evaluator:
        for rank in (1, RANK):
            out = tmp_path / f"rank-{rank}.gguf"
            write_factored(folder / "new.gguf", folder / "before.gguf", calibration, rank, out, silent_report)
            assert set(read_weights(out)) == {name + end for name in MATRICES for end in (DOWN, UP)}
            reading = evaluator.measure(folder / "before.gguf", None, out)["letters"]
            distances.append(float(np.mean(reading.kl)))
        start = float(np.mean(evaluator.measure(folder / "before.gguf")["letters"].kl))
    assert distances[1] < 1e-3 * start  # the change is of that rank: what is left are the bits of the factors
    assert distances[1] < distances[0] < start


def test_from_the_installed_file_an_adapter_mends_its_rounding_too(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    text = Text("letters", tokens(6, 2 * RUN_TOKENS))
    new, installed, out = folder / "new.gguf", folder / "installed.gguf", tmp_path / "out.gguf"
    write_factored(new, installed, calibration, 24, out, silent_report)
    with Evaluator(new, [text], tmp_path / "readings", 1, silent) as evaluator:
        mended = evaluator.measure(installed, None, out)["letters"]
        update = evaluator.measure(installed, None, folder / "lora.gguf")["letters"]
    assert np.mean(mended.kl) < 0.8 * np.mean(update.kl)


def test_what_no_adapter_can_be_made_of_is_refused(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    new, out = folder / "new.gguf", tmp_path / "out.gguf"
    with pytest.raises(
        RequestError, match=r"a rank of 32 is none for blk\.0\.attn_k\.weight, which has 32 x 64"
    ):
        write_factored(new, folder / "installed.gguf", calibration, 32, out, silent_report)
    with pytest.raises(RequestError, match="have the same matrices"):
        write_factored(new, new, calibration, 4, out, silent_report)
    with pytest.raises(ModelFileError, match=r"is no adapter: general\.type is not given"):
        pack(new, out)
    assert not out.exists()


def test_an_adapter_that_passes_is_written_beside_the_chosen_file_and_the_cheaper_one_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: LOOSE)
    options = ("--budget", "20%", "--golden", str(folder / "golden.toml"), "--adapter", f"rank={RANK}")
    assert main([*command(folder, *options), "--force"]) == 0
    said = capsys.readouterr().out
    out = folder / "chosen.adapter.gguf"
    size = out.stat().st_size
    assert f"{out}: " in said
    assert re.search(rf"^adapter +{size:,} ", said, re.MULTILINE)  # a row of the table
    assert f"adapter: of rank {RANK}, from the installed file to the new model" in said
    assert said.count("golden: 1 of the 1 prompts that plain answers") == 2
    assert "Both pass; the " in said
    record = json.loads((folder / "chosen.adapter.gguf.requantized.json").read_bytes())
    assert (record["rank"], record["given"]) == (RANK, None)
    (folder / "chosen.gguf").unlink()
    assert main(command(folder, *options)) == 1
    assert f"{out}: exists" in capsys.readouterr().err
    out.unlink()


def test_an_adapter_that_is_worse_than_plain_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = write_adapter(folder / "wrong.gguf", folder / "before.gguf", 9)
    assert main([*command(folder, "--budget", "20%", "--adapter", str(wrong)), "--force", "--json"]) in {0, 1}
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"][-3:]] == ["chosen", "adapter", "adapter, 8 bits"]
    assert found["rows"][-2]["delta_bytes"] == wrong.stat().st_size > found["rows"][-1]["delta_bytes"]
    assert [each["is_passed"] for each in found["adapters"]] == [False, False]
    assert {each["checks"][0]["status"] for each in found["adapters"]} == {"failed"}
    assert not (folder / "chosen.adapter.gguf").exists()


def test_an_adapter_for_another_model_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = adapter_parts(folder / "before.gguf", 1, names=MATRICES[:1])
    other = write_parts(folder / "other.gguf", parts, architecture="qwen2")
    assert main(command(folder, "--adapter", str(other), "--force")) == 1
    assert "'qwen2'" in capsys.readouterr().err
    assert main(command(folder, "--adapter", str(folder / "none.gguf"), "--force")) == 1
    assert "none.gguf: no such file" in capsys.readouterr().err
    own = write_parts(folder / "chosen.adapter.gguf", parts)
    assert main(command(folder, "--adapter", str(own), "--force")) == 1
    assert f"{own}: is the adapter that was given" in capsys.readouterr().err
    own.unlink()
    assert main(command(folder, "--adapter", "rank=0", "--force")) == 2
    bare = command(folder)[: -2 * len(HELD_OUT)]
    assert main([*bare, "--unjudged", "--adapter", "rank=2", "--force"]) == 1
    assert "--unjudged and --adapter contradict each other" in capsys.readouterr().err
