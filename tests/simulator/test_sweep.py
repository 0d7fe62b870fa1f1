"""Many runs: the same numbers from any number of workers and any engine, and an end that leaves nothing behind."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import msgspec
import psutil
import pytest

from protocol.errors import RequestError
from simulator.cli import main
from simulator.engines import code_digest, local_engine
from simulator.figures import Figures, figures_of, share_reached
from simulator.fleet import run_fleet
from simulator.intervals import student_t, summary_of
from simulator.population import mixed_population
from simulator.sampling import AS_IS, IN_PROPORTION, SampleResult, plan_sample, sampled
from simulator.scenario import Model, Scenario
from simulator.sweep import Row, Task, cells_of, parse_seeds, plan_sweep, run_task, run_tasks

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
SWEEP = [
    *("sweep", "--scenario", "release", "--set", "devices=8", "--set", "model.bytes=65536"),
    *("--set", "releases.0.canary_count=2", "--set", "faults.end_s=200", "--over", "faults.drop=0,0.3"),
]


def lines(text: str) -> list[Row]:
    return [msgspec.json.decode(line, type=Row) for line in text.splitlines()]


def test_a_sweep_gives_the_same_numbers_from_one_worker_two_and_by_hand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    assert main([*SWEEP, "--seeds", "1-3", "--workers", "2", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "faults.drop" in captured.out
    assert "6 of 6 runs, 0 failed" in captured.err
    assert main([*SWEEP, "--seeds", "1-3", "--workers", "1", "--json"]) == 0
    rows = lines(capsys.readouterr().out)
    assert lines(out.read_text()) == rows
    assert [(row.cell, row.seed) for row in rows] == [
        ({"faults.drop": drop}, seed) for drop in ("0", "0.3") for seed in (1, 2, 3)
    ]
    tasks = plan_sweep("release", [*SWEEP[4::2][:4]], ["faults.drop=0,0.3"], [3])
    assert [run_task(task) for task in tasks] == [rows[2], rows[5]]
    assert rows[5].figures.faults > 0 == rows[2].figures.faults
    assert len({row.figures.trace_digest for row in rows}) == len(rows)


def test_cells_sum_up_their_seeds_and_a_share_never_reached_is_no_number() -> None:
    tasks = plan_sweep("tiny-disks", ["devices=20", "model.prompts=1"], [], [1, 2])
    rows = [run_task(task) for task in tasks]
    (cell,) = cells_of(rows, ["t50_s", "t99_s", "down_bytes"])
    assert (cell.cell, cell.runs, cell.failed) == ({}, 2, 0)
    down = cell.summaries["down_bytes"]
    assert down is not None
    assert down.mean == fmean(row.figures.down_bytes for row in rows)
    assert down.low is not None
    assert down.high is not None
    assert down.low <= down.mean <= down.high
    assert cell.summaries["t50_s"] is not None
    assert cell.summaries["t99_s"] is None  # a quarter of the disks is too small


def test_a_run_that_broke_a_promise_makes_the_sweep_fail(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["sweep", "--set", "devices=5", "--set", "model.bytes=65536", "--set", "duration_s=60"]
    assert main([*short, "--seeds", "1"]) == 1
    assert "the run is not over after 60 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "5-1"], "is empty"),
        (["--seeds", "one"], "is no seed"),
        (["--seeds", "1,1"], "twice"),
        (["--seeds", "1-100000", "--over", "devices=1,2"], "more than 100000 runs"),
        (["--over", "devices"], "FIELD=VALUE"),
        (["--over", "devices=1,none"], "Expected `int`"),
        (["--over", "faults.drop=0,0.1"], "faults.end_s"),
        (["--workers", "0"], "between 1 and 256"),
        (["--show", "t50"], "there is no figure 't50'"),
        (["--scheduler", "tcp://127.0.0.1:1"], "--engine dask"),
        (["--out", "nowhere/rows.jsonl"], "--out"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--seeds", "1", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_interrupted_sweep_keeps_what_is_done_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "simulator.cli", *SWEEP, "--seeds", "1-50", "--workers", "2"]
    with subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first tenth is done
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "faults.drop" in printed
    assert 9 <= len(lines(out.read_text())) < 100
    assert psutil.wait_procs(children, timeout=WAIT_S)[1] == []


def test_a_run_beyond_the_memory_of_a_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.engines.memory_share_bytes", lambda _workers: 150 << 20)
    task = Task(cell={}, scenario=Scenario(devices=1, model=Model(bytes=100 << 20)))
    with local_engine(1) as engine, pytest.raises(RequestError, match="memory"):
        list(run_tasks([task], engine, 1))


@pytest.mark.skipif(find_spec("distributed") is None, reason="needs Dask: pip install 'whimbrel[dask]'")
def test_dask_gives_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "simulator.cli", *SWEEP, "--seeds", "1-3", "--json"]
    there = subprocess.run(
        [*command, "--engine", "dask", "--workers", "2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert main([*SWEEP, "--seeds", "1-3", "--json"]) == 0
    assert lines(there.stdout) == lines(capsys.readouterr().out)


@pytest.mark.skipif(find_spec("distributed") is not None, reason="Dask is installed")
def test_without_dask_the_engine_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--seeds", "1", "--engine", "dask"]) == 1
    assert "pip install 'whimbrel[dask]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("distributed") is None, reason="needs Dask: pip install 'whimbrel[dask]'")
def test_a_scheduler_that_does_not_answer_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"]
    assert main(["sweep", "--seeds", "1", *options]) == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_the_code_of_a_worker_is_known_by_a_digest() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64


def test_seeds_are_written_as_ranges_and_lists() -> None:
    assert parse_seeds("1-3,7, 9") == [1, 2, 3, 7, 9]


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (999, 1.962)],
)
def test_student_t_agrees_with_the_printed_tables(degrees: int, expected: float) -> None:
    assert student_t(0.95, degrees) == pytest.approx(expected, rel=0.002)


def test_a_single_number_has_no_interval() -> None:
    assert summary_of([3.0]).high is None
    assert summary_of([1.0, 3.0]).high == pytest.approx(2 + 12.706, rel=0.001)


def test_a_share_is_reached_by_the_device_that_completes_it() -> None:
    instants = [1.0, 2.0, 3.0, 4.0]
    assert [share_reached(instants, share, 4) for share in (0.5, 0.75, 0.76, 1.0)] == [2.0, 3.0, 4.0, 4.0]
    assert share_reached(instants, 0.99, 5) is None
    assert share_reached([], 0.5, 0) is None


def test_the_devices_of_a_shard_are_those_of_the_fleet() -> None:
    whole = Scenario(devices=40, population=mixed_population(), model=Model(bytes=65_536))
    kinds = run_fleet(whole).kinds
    shards = plan_sample(whole, 4, 10)
    assert [task.scenario.first_device for task in shards] == [0, 10, 20, 30]
    parts = [run_fleet(task.scenario).kinds for task in shards]
    for name, kind in kinds.items():
        assert sum(part[name].devices for part in parts if name in part) == kind.devices


def test_shards_say_of_a_fleet_what_a_run_of_all_of_it_says() -> None:
    whole = Scenario(devices=200, population=mixed_population(), model=Model(bytes=65_536))
    truth = figures_of(run_fleet(whole))
    tasks = plan_sample(whole, 5, 20)
    result = sampled(whole, 20, [run_task(task) for task in tasks])
    assert (result.shards, result.shard_devices, result.failed) == (5, 20, 0)
    assert [estimate.figure for estimate in result.estimates] == [*AS_IS, *IN_PROPORTION]
    by_name = {estimate.figure: estimate for estimate in result.estimates}
    assert by_name["committed"].value == truth.committed == 200
    for name in ("down_bytes", "update_median_s"):
        estimate = by_name[name]
        assert estimate.value == pytest.approx(getattr(truth, name), rel=0.15)
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


def test_a_sample_needs_shards_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["sample", "--devices", "40", "--set", "model.bytes=65536", "--json"]
    assert main([*small, "--shards", "2", "--shard-devices", "10", "--workers", "2", "--seed", "4"]) == 0
    result = msgspec.json.decode(capsys.readouterr().out, type=SampleResult)
    assert (result.scenario.seed, result.scenario.devices, result.shards) == (4, 40, 2)
    for options in (["--shards", "1"], ["--shards", "5", "--shard-devices", "10"]):
        assert main([*small, *options]) == 1
        assert "no sample of 40 devices" in capsys.readouterr().err


def test_compare_tells_what_became_worse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--devices", "20", "--set", "model.bytes=65536"]
    slow = ["--set", "population.0.link.down_bytes_per_s=20000"]
    paths = []
    for name, more in (("a", []), ("b", slow)):
        assert main(["fleet", *options, *more, "--json"]) == 0
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(capsys.readouterr().out)
    a, b = map(str, paths)
    assert main(["compare", a, a]) == 0
    assert "worse" not in capsys.readouterr().out
    assert main(["compare", a, b, "--json"]) == 1
    rows = {row["figure"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == list(Figures.__struct_fields__)
    assert rows["t50_s"]["is_worse"]
    assert rows["t50_s"]["ratio"] > 1.1
    assert not rows["committed"]["is_worse"]
    assert rows["trace_digest"]["before"] != rows["trace_digest"]["after"]
    assert main(["compare", b, a]) == 0
    assert main(["compare", a, b, "--tolerance", "1000000"]) == 0


def test_compare_runs_scenarios_and_refuses_what_is_neither(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = 'devices = 10\n[model]\nbytes = 65_536\n[[releases]]\nkind = "{}"\n'
    for kind in ("good", "wrong"):
        (tmp_path / f"{kind}.toml").write_text(small.format(kind))
    good, wrong = str(tmp_path / "good.toml"), str(tmp_path / "wrong.toml")
    assert main(["compare", good, wrong]) == 1
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("t50_s", "committed", "rolled_back", "blast_radius"):
        assert table[name].rstrip().endswith("worse")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "old.json").write_text('{"trace_digest": "00"}')
    for name, words in (
        ("broken.json", "truncated"),
        ("old.json", "missing required field"),
        ("none.json", "No such"),
    ):
        assert main(["compare", good, str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
