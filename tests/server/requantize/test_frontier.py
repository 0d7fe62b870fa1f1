"""A frontier from the command down to the file: points are made once, chosen by the development text, and judged by the held-out ones."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from protocol.errors import RequestError, StorageError
from server.cli import main
from server.requantize import command as command_module
from server.requantize.choice import Chosen
from server.requantize.evaluation import quantize
from server.requantize.frontier import FRONTIER_SUFFIX, Budget, FrontierBench, Made, budgets_of, first_price
from server.requantize.guards import Margins
from server.requantize.model import sha256_of
from server.requantize.provenance import Sources
from server.requantize.record import RECORD_SUFFIX
from server.requantize.search import BUDGET_USED_MIN, SmallBudgetError
from server.requantize.settings import Settings
from server.requantize.texts import RUN_TOKENS
from server.scorecard.frontier import decode_frontier
from server.scorecard.journal import Journal
from tests.models import write_language_model
from tests.server.requantize.readings import reading

LETTERS = "klmnop0123456789"
HELD_OUT = ("letters.txt", "digits.txt")
Q4_0, Q8_0_TYPE = 2, 8  # llama_ftype, ggml_type


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one trained on from it, the first one quantized, and four texts that share nothing."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")
    made = tmp_path_factory.mktemp("frontier")
    before = write_language_model(made / "before.gguf", 1)
    write_language_model(made / "new.gguf", 1, noise=0.2)
    quantize(before, made / "installed.gguf", Q4_0, Q8_0_TYPE, 1)
    draws = np.random.default_rng(7)
    for name in ("calibration.txt", "development.txt", *HELD_OUT):
        letters = {HELD_OUT[0]: LETTERS[:6], HELD_OUT[1]: LETTERS[6:]}.get(name, LETTERS)
        (made / name).write_text("".join(draws.choice(list(letters), 2 * RUN_TOKENS + 100)))
    return made


def run(folder: Path, *options: str) -> int:
    held_out = [part for name in HELD_OUT for part in ("--held-out", str(folder / name))]
    order = [
        "requantize",
        str(folder / "new.gguf"),
        *("--installed", str(folder / "installed.gguf"), "--out", str(folder / "chosen.gguf")),
        *(
            "--calibration",
            str(folder / "calibration.txt"),
            "--runs",
            "4",
            "--workers",
            "1",
            "--force",
            "--json",
        ),
        *("--development", str(folder / "development.txt"), *held_out),
    ]
    return main([*order, *options])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("chosen.gguf*")}


def test_points_are_made_once_and_a_file_is_written_only_where_one_of_them_is_good_enough(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, "--frontier", "6%,1,2%") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["is_written"], found["frontier"]["chosen"]) == (False, "")
    assert not files_of(folder)
    points = found["frontier"]["points"]
    assert [each["name"] for each in points] == [
        "nothing sent",
        "plain",
        "plain, embedding frozen",
        "2%",
        "6%",
    ]
    assert found["frontier"]["notes"][0].startswith("1: what is no code takes ")
    length = (folder / "installed.gguf").stat().st_size
    for point, share in zip(points[3:], (0.02, 0.06), strict=True):
        assert 0.5 * share * length < point["delta_bytes"] <= share * length
    kl = [each["kl"]["value"] for each in points]
    assert kl[0] > kl[3] > kl[4] > kl[1]
    readings = folder / "calibration" / "readings"
    assert (
        len(list(readings.glob("reference-*"))) == 1
    )  # of the development text: the others were not looked at

    # A kill in the middle of the last point: it is made again, with the same bytes, and the others are not.
    (path,) = [each for each in readings.glob("*.jsonl") if b'"point:' in each.read_bytes()]
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:100])
    monkeypatch.setattr(command_module, "Margins", lambda: Margins(kl_share=1.0, flips=1.0))
    assert run(folder, "--frontier", "2%,6%,1") == 0
    again = json.loads(capsys.readouterr().out)["frontier"]
    assert again["points"] == points
    assert path.read_bytes().splitlines()[1 : len(lines)] == [line.rstrip() for line in lines[1:]]
    assert len(path.read_bytes().splitlines()) == len(lines) + 2  # what was cut, and once again
    assert again["chosen"] == "6%"
    record = decode_frontier(files_of(folder)[f"chosen.gguf{FRONTIER_SUFFIX}"], "record")
    assert (record.chosen, record.result) == ("6%", sha256_of(folder / "chosen.gguf"))
    assert [each.text for each in record.held_out] == list(HELD_OUT)
    provenance = json.loads(files_of(folder)[f"chosen.gguf{RECORD_SUFFIX}"])
    assert (provenance["price"], provenance["sources"]["result"]) == (
        record.point("6%").price,
        record.result,
    )


def test_each_point_has_the_bytes_to_the_devices_of_each_installed_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "Margins", lambda: Margins(kl_share=1.0, flips=1.0))
    other, second = write_language_model(folder / "other.gguf", 1, noise=0.01), folder / "second.gguf"
    quantize(other, second, Q4_0, Q8_0_TYPE, 1)
    assert run(folder, "--frontier", "20%", "--also", f"{second}=0.25") == 0
    frontier = json.loads(capsys.readouterr().out)["frontier"]
    files = [sha256_of(folder / "installed.gguf"), sha256_of(second)]
    assert frontier["fleet"] == [
        {"installed": file, "share": share} for file, share in zip(files, (0.75, 0.25), strict=True)
    ]
    for point in frontier["points"]:
        first, last = point["each_bytes"]
        assert point["delta_bytes"] == round(0.75 * first + 0.25 * last)
        assert (first == last == 0) == (point["name"] == "nothing sent")
    decode_frontier(files_of(folder)[f"chosen.gguf{FRONTIER_SUFFIX}"], "record")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frontier", "1%", "--unjudged"], "--unjudged and --held-out contradict"),
        (["--frontier", "1%", "--budget", "2%", "--keep", "90%"], "--budget and --keep contradict"),
        (["--frontier", "1%,685"], "685 and 1% of the frontier are both 685 bytes"),
        (["--frontier", ""], "'' is neither bytes nor a share"),
        (["--frontier", "1%,"], "'' is neither bytes nor a share"),
        (["--frontier", "1%,much"], "'much' is neither bytes nor a share"),
        (["--frontier", "1%,0%"], "0% is not between 0 and 100 %"),
        (["--frontier", "1%," * 15 + "2%"], "16 budgets, possible are 15"),
        (["--frontier", f"0.{'0' * 30}1%"], "has more than 24 characters"),
    ],
)
def test_budgets_that_are_none_and_options_that_do_not_go_together_are_refused(
    folder: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *options) != 0
    assert words in "".join(capsys.readouterr())


def test_the_operators_budget_is_a_point() -> None:
    named = {"1%": lambda length: length // 100, "2%": lambda length: length // 50}
    assert [each.name for each in budgets_of(named, 10, 1000)] == ["1%", "2%"]
    assert budgets_of(named, 15_000, 1_000_000)[-1] == Budget("15,000 bytes", 15_000)
    assert budgets_of({}, 10, 1000) == ()
    with pytest.raises(RequestError, match="2% and 1% of the frontier are both 0 bytes"):
        budgets_of(named, None, 10)


def chosen(price: float, size: int, *rounds: tuple[float, int], result: str = "") -> Chosen:
    return Chosen(
        price=price,
        delta_bytes=size,
        file_bytes=1,
        changed={},
        codes=1,
        kept=(),
        objective_before=1.0,
        objective_after=0.5,
        rounds=rounds or ((price, size),),
        divergences=(),
        seconds=1.0,
        settings=Settings(price=price),
        sources=Sources(
            new="",
            installed="",
            before=None,
            start=None,
            calibration_model="",
            calibration_tokens="",
            calibration_runs=(1, 1),
            result=result,
        ),
    )


@contextmanager
def bench_of(
    folder: Path, asked: Settings, written: bytes, orders: list[Settings]
) -> Iterator[FrontierBench]:
    """A bench whose choices write the same bytes each time, and note what they were asked for."""
    file = folder / "chosen.gguf"

    def choose(settings: Settings) -> Chosen:
        orders.append(settings)
        file.write_bytes(written)
        return chosen(1e-8, 10)

    def measure() -> Any:
        raise SmallBudgetError("unused")

    with closing(Journal(folder / "journal", {})) as kept:
        yield FrontierBench(asked, kept, file, choose, measure, lambda _: None)


def made(*rounds: tuple[float, int]) -> Made:
    return Made("a", rounds[-1][1], reading(1, 1.0, 0.1, 0.1), chosen(*rounds[-1], *rounds))


def test_a_search_begins_where_smaller_files_say_that_the_price_lies() -> None:
    assert first_price(1000, []) is None
    middle = (1 + BUDGET_USED_MIN) / 2
    falling = made((1e-6, 1_000), (1e-8, 10_000))  # bytes times ten, price by a hundred
    assert first_price(100_000, [falling]) == pytest.approx(1e-10 / middle**2)
    assert first_price(10_000, [made((1e-8, 10_000))]) == pytest.approx(1e-8 * middle**-1.25)
    twice = made((1e-8, 10_000), (1e-7, 10_001))  # of one length: they say nothing of the slope
    found = first_price(20_000, [twice])
    assert found is not None
    assert found == pytest.approx(1e-7 * math.exp(-1.25 * math.log(middle * 20_000 / 10_001)))


def test_a_file_that_comes_out_otherwise_than_it_was_measured_is_not_believed(tmp_path: Path) -> None:
    orders: list[Settings] = []
    point = chosen(1e-8, 10, result="0" * 64)
    with bench_of(tmp_path, Settings(), b"other bytes", orders) as bench:
        with pytest.raises(StorageError, match="has other bytes than when it was measured"):
            bench.remake(point)
        assert [(each.price, each.budget_bytes) for each in orders] == [(1e-8, None)]
        result = sha256_of(tmp_path / "chosen.gguf")
        bench.remake(replace(point, sources=replace(point.sources, result=result)))
    assert len(orders) == 1  # it is there


@pytest.mark.parametrize("asked", [Settings(distillation=1), Settings(learned=1)])
def test_a_point_that_read_text_is_made_again_as_it_was_asked_for(tmp_path: Path, asked: Settings) -> None:
    """Not at its price alone: what reads text depends on the budget, and on prices on the way."""
    orders: list[Settings] = []
    settings = replace(asked, budget_bytes=10, first_price=2e-8)
    result = hashlib.sha256(b"bytes").hexdigest()
    with bench_of(tmp_path, asked, b"bytes", orders) as bench:
        bench.remake(replace(chosen(1e-8, 10, result=result), settings=settings))
    assert orders == [settings]
