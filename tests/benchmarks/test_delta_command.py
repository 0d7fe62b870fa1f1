import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks import delta, large
from benchmarks.catalog import PAIRS, missing, select
from benchmarks.edits import write_random
from benchmarks.rows import Cost, Row
from benchmarks.wheels import Member, extract
from benchmarks.workshop import Workshop
from protocol.errors import ModelFileError, RequestError
from protocol.tensors import BytesSource, parse_gguf


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for seed in (1, 2):
        write_random(seed, tmp_path / f"random-{seed}.bin", length=2_000)
    return tmp_path


def test_the_command_prints_a_table_requirements_and_json_lines(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pairs", "random", "--cache", str(cache), "--peers", "xz,bsdiff4", "--json"]
    assert delta.main(arguments) == 1  # a header of ours is more than 1 % of so small a file
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["method"] for row in rows] == ["small", "fast", "xz", "bsdiff4"]
    assert all(row["conditional_bytes"] == 2_000 for row in rows)
    assert re.search(r"^random  small ", out, re.MULTILINE)
    assert "small, of best peer: vendor, metadata, growth, random" in out


def test_peers_come_from_an_earlier_run_on_the_same_files(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pairs", "random", "--cache", str(cache), "--peers", "xz", "--no-estimates", "--json"]
    delta.main(arguments)
    earlier = cache / "earlier.txt"
    text = capsys.readouterr().out.replace('"wall_s": ', '"wall_s": 1000')
    earlier.write_text(text)
    delta.main([*arguments, "--peers-from", str(earlier)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["build"]["wall_s"] >= 1000 for row in rows] == [False, False, True]
    write_random(3, cache / "random-2.bin", length=2_000)
    delta.main([*arguments, "--peers-from", str(earlier)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert rows[-1]["build"]["wall_s"] < 1000


def test_earlier_runs_are_shown_together_each_pair_from_one_of_them(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pairs", "random", "--cache", str(cache), "--json"]
    shown = []
    runs = []
    for number, peers in enumerate(("xz,bsdiff4", "xz")):
        delta.main([*arguments, "--peers", peers])
        shown.append(capsys.readouterr().out)
        runs.append(tmp_path / f"{number}.txt")
        runs[-1].write_text(shown[-1])
    measured = [argument for run in runs for argument in ("--measured", str(run))]
    assert delta.main(measured) == 1
    assert capsys.readouterr().out == "".join(
        line for line in shown[1].splitlines(keepends=True) if not line.startswith("{")
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--measured", "none.txt"], "none.txt: no JSON lines of an earlier run"),
        (["--pairs", "nothing"], "no pair is called nothing"),
        (["--pairs", "random", "--peers", "rar"], "no method is called rar"),
        (["--pairs", "random", "--peers-from", "none.txt"], "none.txt: no JSON lines of an earlier run"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], complaint: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert delta.main([*arguments, "--cache", str(cache)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_pairs_have_names_of_their_own_and_are_chosen_by_pattern() -> None:
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)
    assert [pair.name for pair in select(["large.*"])] == ["large.q4_0", "large.q4_k_m", "large.q8_0"]


def test_a_pair_is_missing_what_is_not_in_the_cache(cache: Path) -> None:
    pair = select(["random"])[0]
    assert missing(pair, cache) == []
    (cache / pair.new).unlink()
    assert missing(pair, cache) == [pair.new]


def test_a_file_is_made_once_after_what_it_is_made_of(tmp_path: Path) -> None:
    made = []

    def whole(_shop: Workshop, _match: re.Match[str], out: Path) -> None:
        made.append("whole")
        out.write_text("one")

    def part(shop: Workshop, match: re.Match[str], out: Path) -> None:
        content = shop.file("whole").read_text()
        made.append("part")
        out.write_text(content + match[1])

    for _ in range(2):
        shop = Workshop(tmp_path / "new", [("whole", whole), (r"part(\d)", part)], lambda _line: None)
        assert shop.file("part2").read_text() == "one2"
    assert made == ["whole", "part"]
    with pytest.raises(RequestError, match="nothing is no file of a pair"):
        shop.file("nothing")


def test_what_was_being_made_when_a_run_stopped_is_made_again(tmp_path: Path) -> None:
    def stopped(_shop: Workshop, _match: re.Match[str], out: Path) -> None:
        out.write_text("half")
        raise KeyboardInterrupt

    shop = Workshop(tmp_path, [("file", stopped)], lambda _line: None)
    with pytest.raises(KeyboardInterrupt):
        shop.file("file")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_another_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    member = Member("a==1", "a/model", 3, "0" * 64)
    wheel.write_bytes(b"no archive")
    with pytest.raises(ModelFileError, match="does not hold a/model"):
        extract(wheel, member, tmp_path / "out")


def test_a_large_file_repeats_tensors_with_their_rows_rotated(tmp_path: Path) -> None:
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(2)
    values = np.arange(100 * 8, dtype=np.float32).reshape(100, 8)
    for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    large.write_repeated(source, out, 3 * source.stat().st_size)
    regions = {region.name: region for region in parse_gguf(BytesSource(out.read_bytes())).regions}
    assert {"token_embd.weight", "copy.2.token_embd.weight", "blk.5.ffn_up.weight"} <= set(regions)
    assert gguf.GGUFReader(out).fields["llama.block_count"].contents() == 6
    last = next(each for each in gguf.GGUFReader(out).tensors if each.name == "blk.5.ffn_up.weight")
    np.testing.assert_array_equal(np.asarray(last.data), np.roll(values, 74, axis=0))


def test_large_files_are_judged_by_memory_and_linear_time() -> None:
    def row(pair: str, length: int, cpu_s: float, peak: int) -> Row:
        cost = Cost(cpu_s, cpu_s, cpu_s, peak)
        return Row(pair, "fast", "1", "b", "n", length, 10, cost, cost)

    assert large.complaints([row("1 GB", 10**9, 10, 10**8), row("4 GB", 4 * 10**9, 44, 10**8)]) == []
    found = large.complaints([row("1 GB", 10**9, 10, 10**8), row("4 GB", 4 * 10**9, 60, 2 * 10**8)])
    assert found == [
        "4 GB fast: apply takes 200 MB, more than 128",
        "fast: a byte of 4 GB takes 1.50 times the build time of one of 1 GB",
        "fast: a byte of 4 GB takes 1.50 times the apply time of one of 1 GB",
    ]


@pytest.mark.parametrize("sizes", ["", "x", "0", "1,-2", "1000"])
def test_wrong_sizes_are_refused(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert large.main(["--sizes", sizes]) == 2
    assert capsys.readouterr().err.startswith("error: --sizes")
