"""One file for devices that have several: what it costs each of them, what is refused, and where the shares come from."""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.gguf_files import Stored, read_stored, write_gguf
from protocol.delta.layouts import LAYOUTS, Array
from protocol.errors import ModelFileError, RequestError
from protocol.ids import DeviceId, digest_of
from protocol.tensors import Layout
from server import operations
from server.cli import main
from server.fleet.registry import DeviceRecord
from server.home import opened
from server.requantize.anchors import anchors_of, cheapest_codes, leading_rows
from server.requantize.calibration import Calibration, calibrate
from server.requantize.choice import Chosen, choose
from server.requantize.codes import CodedRows
from server.requantize.descent import Metric, Price, descend
from server.requantize.portions import PORTIONS_MAX, Portion, check_fleet, main_first
from server.requantize.running import running
from server.requantize.sent import Sent, check_sent, sent_lines
from server.requantize.settings import Settings
from server.requantize.weighing import delta_bytes
from tests.models import write_language_model
from tests.server.requantize.samples import TYPES, quantized, tokens
from tests.server.samples import report as device_report


def _quiet(_line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Floats `new`; `v1` and `v2` quantized, with codes and scales that differ in places; `v1-again…`, which have the tensors of `v1`."""
    folder = tmp_path_factory.mktemp("models")
    before = write_language_model(folder / "before.gguf", 1)
    between = write_language_model(folder / "between.gguf", 1, noise=0.005)
    write_language_model(folder / "new.gguf", 1, noise=0.02)
    quantized(before, folder / "v1.gguf")
    quantized(between, folder / "v2.gguf")
    for number in range(2):
        named = {"llama.context_length": 512 + number}
        write_gguf(
            folder / "v1.gguf", folder / f"v1-again{number}.gguf", read_stored(folder / "v1.gguf"), named
        )
    return folder


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return calibrate(
        folder / "new.gguf", tokens(1), folder / "calibration", _quiet, sequences=8, sequence_tokens=64
    )


def _choose(
    folder: Path,
    calibration: Calibration,
    out: Path,
    installed: str,
    also: Sequence[Portion] = (),
    **settings: object,
) -> Chosen:
    settings = {"workers": 1, "price": 1e-8, **settings}
    asked = Settings(**settings)  # type: ignore[arg-type]  # names and values of its fields
    return choose(folder / "new.gguf", folder / installed, calibration, asked, out, _quiet, also=also)


@pytest.mark.parametrize("shares", [(0.5,), (0.3,), (0.3, 0.2)])
def test_files_with_the_same_codes_are_one(
    folder: Path, calibration: Calibration, tmp_path: Path, shares: Sequence[float]
) -> None:
    alone = _choose(folder, calibration, tmp_path / "alone.gguf", "v1.gguf")
    again = [Portion(folder / f"v1-again{number}.gguf", share) for number, share in enumerate(shares)]
    both = _choose(folder, calibration, tmp_path / "both.gguf", "v1.gguf", again)
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "both.gguf").read_bytes()
    assert alone.sent == ()
    assert [each.share for each in both.sent] == [1 - sum(shares), *shares]


def test_what_each_file_is_sent_is_its_delta_and_the_budget_holds_their_mean(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    chosen = _choose(
        folder,
        calibration,
        out,
        "v1.gguf",
        [Portion(folder / "v2.gguf", 0.25)],
        price=None,
        budget_bytes=7000,
    )
    assert [each.name for each in chosen.sent] == ["v1.gguf", "v2.gguf"]
    for each in chosen.sent:
        assert each.delta_bytes == delta_bytes(folder / each.name, out)
        assert each.sha256 == digest_of((folder / each.name).read_bytes())
    first, second = (each.delta_bytes for each in chosen.sent)
    assert chosen.delta_bytes == round(0.75 * first + 0.25 * second)
    assert 0.9 * 7000 < chosen.delta_bytes <= 7000


def test_devices_whose_share_is_larger_are_sent_less(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    sizes = []
    for share in (0.1, 0.3, 0.7, 0.9):
        installed, also = main_first(folder / "v1.gguf", [Portion(folder / "v2.gguf", share)])
        chosen = _choose(folder, calibration, tmp_path / f"{share}.gguf", installed.name, also, price=1e-7)
        sizes.append({each.name: each.delta_bytes for each in chosen.sent})
    to_v2 = [size["v2.gguf"] for size in sizes]
    assert to_v2 == sorted(to_v2, reverse=True)
    assert to_v2[0] > 1.3 * to_v2[-1]
    to_v1 = [size["v1.gguf"] for size in sizes]
    assert to_v1 == sorted(to_v1)


def test_one_file_for_all_costs_less_than_the_best_file_for_one_of_them(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """At the same price, in what is minimized: loss plus price times the mean of the bits."""
    price, also = 1e-6, [Portion(folder / "v2.gguf", 0.4)]
    common = _choose(folder, calibration, tmp_path / "common.gguf", "v1.gguf", also, price=price)
    for name in ("v1.gguf", "v2.gguf"):
        out = tmp_path / name
        alone = _choose(folder, calibration, out, name, price=price)
        mean = 0.6 * delta_bytes(folder / "v1.gguf", out) + 0.4 * delta_bytes(folder / "v2.gguf", out)
        assert (
            common.objective_after + 8 * price * common.delta_bytes < alone.objective_after + 8 * price * mean
        )


@pytest.mark.parametrize("kind", [TYPES.Q4_1, TYPES.Q8_0])
def test_other_quantizations_are_chosen_for_several_as_well(
    folder: Path, calibration: Calibration, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    for name, source in (("v1", "before"), ("v2", "between")):
        quantized(folder / f"{source}.gguf", tmp_path / f"{name}.gguf", kind)
    chosen = choose(
        folder / "new.gguf",
        tmp_path / "v1.gguf",
        calibration,
        Settings(price=1e-7, workers=1),
        tmp_path / "out.gguf",
        _quiet,
        also=[Portion(tmp_path / "v2.gguf", 0.3)],
    )
    assert chosen.objective_after < chosen.objective_before
    assert chosen.sent[0].delta_bytes < chosen.sent[1].delta_bytes


def _rows(codes: Sequence[int], scale: float) -> CodedRows:
    layout = LAYOUTS[Layout.Q4_0]
    fields: dict[str, Array] = {
        "d": np.full((1, 1), scale, np.float16).view(np.uint16),
        layout.codes.name: np.array(codes, np.uint8).reshape(1, 32),
    }
    return CodedRows.read(Layout.Q4_0, layout.join(fields).tobytes(), 32)


def test_a_block_has_the_scale_that_most_of_the_fleet_has_and_devices_with_another_the_nearest_codes() -> (
    None
):
    held = [_rows([*range(16), *range(16)], 1.0), _rows([8] * 32, 2.0), _rows([11] * 32, 2.0)]
    rows = leading_rows(held, (0.4, 0.3, 0.3))
    assert set(rows.steps.reshape(-1)) == {2.0}
    assert set(rows.codes.reshape(-1)) == {8}
    assert set(leading_rows(held, (0.6, 0.2, 0.2)).steps.reshape(-1)) == {1.0}
    anchors = anchors_of(rows, held)
    assert anchors.shape == (1, 32, 3)
    weights = held[0].weights(held[0].codes)
    assert np.abs(rows.weights(anchors[..., 0]) - weights).max() <= 1.0  # half a step
    assert set(anchors[..., 1].reshape(-1)) == {8}
    assert set(anchors[..., 2].reshape(-1)) == {11}


def test_a_code_that_changes_nothing_goes_to_where_most_of_the_fleet_has_it() -> None:
    rows = _rows([5] * 32, 1.0)
    anchors = np.stack([np.full((1, 32), code, np.int16) for code in (5, 7, 7)], axis=-1)
    none = Metric(np.zeros((32, 32), np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32))
    price = Price(first=9.0, further=2.0, shares=(0.2, 0.4, 0.4))
    start = cheapest_codes(anchors, price)
    assert set(start.reshape(-1)) == {7}
    codes, _ = descend(rows, start, np.zeros((1, 32), np.float32), none, price, anchors=anchors)
    assert np.array_equal(codes, start)
    near = np.stack([np.full((1, 32), code, np.int16) for code in (5, 6, 6)], axis=-1)
    codes, _ = descend(rows, rows.codes, np.zeros((1, 32), np.float32), none, price, anchors=near)
    assert set(codes.reshape(-1)) == {6}
    codes = start
    assert price.of(rows.codes, anchors) == pytest.approx(32 * 0.8 * 11)
    assert price.of(codes, anchors) == pytest.approx(32 * 0.2 * 11)
    assert price.of_step(codes, anchors, -1) == pytest.approx(np.full((1, 32), 0.8 * 9 - 0.2 * 2))


def test_fleets_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    first, other = folder / "v1.gguf", folder / "v2.gguf"
    check_fleet(first, [])
    check_fleet(first, [Portion(other, 0.3)])
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(RequestError, match=r"v2.gguf: a share of .* is not between 0 and 1"):
            check_fleet(first, [Portion(other, share)])
    with pytest.raises(RequestError, match=r"come to 1.1, which leaves nothing for .*v1.gguf"):
        check_fleet(first, [Portion(other, 0.3), Portion(folder / "v1-again0.gguf", 0.8)])
    with pytest.raises(RequestError, match=r"v1.gguf: is the same file as .*add the two shares"):
        check_fleet(first, [Portion(first, 0.3)])
    with pytest.raises(RequestError, match=f"{PORTIONS_MAX + 1} installed files, at most {PORTIONS_MAX}"):
        check_fleet(first, [Portion(other, 0.01)] * PORTIONS_MAX)
    eight = quantized(folder / "before.gguf", tmp_path / "eight.gguf", TYPES.Q8_0)
    with pytest.raises(ModelFileError, match=r"eight.gguf: blk.* is q8_0, q4_0 in .*v1.gguf"):
        check_fleet(first, [Portion(eight, 0.3)])
    stored = read_stored(other)
    write_gguf(other, tmp_path / "part.gguf", stored[:-1], {})
    with pytest.raises(ModelFileError, match=r"part.gguf: there is no tensor"):
        check_fleet(first, [Portion(tmp_path / "part.gguf", 0.3)])
    with pytest.raises(ModelFileError, match=r"v2.gguf: .*part.gguf has no tensor"):
        check_fleet(tmp_path / "part.gguf", [Portion(other, 0.3)])
    cut = [
        Stored(each.name, each.data[:-1] if each.name == "token_embd.weight" else each.data, each.kind)
        for each in stored
    ]
    write_gguf(other, tmp_path / "cut.gguf", cut, {})
    with pytest.raises(ModelFileError, match=r"cut.gguf: token_embd.weight has the shape"):
        check_fleet(first, [Portion(tmp_path / "cut.gguf", 0.3)])


def test_a_budget_below_what_the_files_differ_by_is_refused_and_says_so(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(
        RequestError, match=r"what the installed files differ by takes [\d,]+ bytes on average"
    ):
        _choose(
            folder,
            calibration,
            tmp_path / "out.gguf",
            "v1.gguf",
            [Portion(folder / "v2.gguf", 0.5)],
            price=None,
            budget_bytes=300,
        )
    assert list(tmp_path.iterdir()) == []


def test_scales_do_not_move_where_devices_have_several_files(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    also = [Portion(folder / "v2.gguf", 0.5)]
    with pytest.raises(RequestError, match=r"scales stay where devices have several files \(leave out"):
        _choose(folder, calibration, tmp_path / "out.gguf", "v1.gguf", also, moves_scales=True)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    damaged = []
    for each in read_stored(folder / "v2.gguf"):
        data = np.array(each.data)
        if each.name == "blk.1.ffn_up.weight":
            data.reshape(-1, 18)[3, :2] = (0x00, 0x7E)  # the scale of a block: not a number
        damaged.append(Stored(each.name, data, each.kind))
    write_gguf(folder / "v2.gguf", tmp_path / "bad.gguf", damaged, {})
    with pytest.raises(ModelFileError, match=r"bad.gguf: blk.1.ffn_up.weight has scales that are no numbers"):
        _choose(folder, calibration, tmp_path / "out.gguf", "v1.gguf", [Portion(tmp_path / "bad.gguf", 0.3)])


def test_a_file_that_costs_some_devices_more_than_plain_does_not_pass() -> None:
    sent = Sent(name="v1", sha256="", share=0.9, delta_bytes=10, plain_bytes=20, alone_bytes=5)
    other = Sent(name="v2", sha256="", share=0.1, delta_bytes=30, plain_bytes=20, alone_bytes=15)
    assert [check.status for check in check_sent([sent, other])] == ["passed", "failed"]
    lines = sent_lines([sent, other])
    assert lines[1].split() == ["v1", "90", "20", "10", "5"]
    assert "fetches 12 B on average; with a file for each of the 2 it would be 6 B" in lines[-1]
    assert sent_lines([]) == []


@pytest.fixture
def home(folder: Path, tmp_path: Path) -> Path:
    """A server's folder: `v1` on two devices, `v2` and `v1-renamed` on one each, one that has long been away."""
    home = tmp_path / "server"
    operations.init_repository(home, "lab", port=0)
    health = tmp_path / "health.json"
    prompt = {"kind": "text", "name": "a", "prompt": "a", "completion": "b", "logprob_mean_min": -50.0}
    health.write_text(
        json.dumps({"prompts": [prompt], "latency_p99_ms_max": 100, "memory_peak_bytes_max": 1 << 30})
    )
    for version in ("v1", "v2", "v1-again0"):
        operations.add_release(
            home, "digits", version, [folder / f"{version}.gguf"], runtime="llama", health=health
        )
    operations.add_release(home, "digits", "v1-renamed", [folder / "v1.gguf"], runtime="llama", health=health)
    versions = ["v1", "v1", "v2", "v1-renamed", "v0", ""]
    with opened(home) as there:
        now_ms = there.clock.now_ms()
        for number, version in enumerate(versions):
            said = device_report(f"d{number}", 1, version)
            there.store.save([DeviceRecord(device=DeviceId(f"d{number}"), report=said, seen_ms=now_ms)])
        gone = device_report("gone", 1, "v1-again0")
        there.store.save([DeviceRecord(device=DeviceId("gone"), report=gone, seen_ms=1)])
    return home


def test_shares_come_from_what_the_devices_of_a_server_report(home: Path, folder: Path) -> None:
    said: list[str] = []
    with running(home, "digits", said.append) as (installed, also):
        assert installed.name == "v1.gguf"
        assert installed.read_bytes() == (folder / "v1.gguf").read_bytes()
        assert [(each.path.name, each.share) for each in also] == [("v2.gguf", 0.25)]
        check_fleet(installed, also)
    assert said == [
        "digits v1: 3 device(s), 75 %",
        "digits v2: 1 device(s), 25 %",
        "1 device(s) with other files are not weighed",
    ]
    assert not installed.exists()
    with (
        pytest.raises(RequestError, match="no device has reported a version of letters"),
        running(home, "letters", _quiet),
    ):
        pass


def _command(folder: Path, *options: str) -> list[str]:
    text = folder / "text.txt"
    text.write_text("".join(np.random.default_rng(3).choice(list("abcdefghij"), 3000)))
    return [
        "requantize",
        str(folder / "new.gguf"),
        "--calibration",
        str(text),
        "--runs",
        "4",
        "--workers",
        "1",
        *options,
    ]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--installed", "{}/v1.gguf", "--also", "{}/v2.gguf"], 2, "is not FILE=SHARE"),
        (
            ["--installed", "{}/v1.gguf", "--also", "{}/v2.gguf=1.5"],
            2,
            "a share of the devices between 0 and 1",
        ),
        (["--installed", "{}/v1.gguf", "--also", "{}/none.gguf=30%"], 1, "none.gguf: no such file"),
        (["--installed", "{}/v1.gguf", "--also", "{}/v1.gguf=0.3"], 1, "is the same file as"),
        (["--fleet", "digits", "--also", "{}/v2.gguf=0.3"], 1, "--fleet and --also contradict"),
        (["--fleet", "digits", "--installed", "{}/v2.gguf"], 2, "not allowed with argument"),
        (["--fleet", "digits", "--dir", "{}/nowhere"], 1, "nowhere"),
        ([], 2, "one of the arguments --installed --fleet is required"),
    ],
)
def test_wrong_fleets_on_the_command_line_are_refused(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [option.format(folder) for option in options]
    assert main(_command(folder, *given, "--out", str(tmp_path / "out.gguf"), "--unjudged")) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _times(folder: Path) -> dict[Path, int]:
    """When each array of a calibration was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


@pytest.mark.llama
def test_the_command_chooses_for_the_fleet_of_a_server_and_goes_on_where_it_was(
    home: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")
    out = tmp_path / "out.gguf"
    given = ["--fleet", "digits", "--dir", str(home), "--out", str(out), "--unjudged", "--budget", "12%"]
    assert main(_command(folder, *given)) == 0
    said = capsys.readouterr()
    assert "digits v1: 3 device(s), 75 %" in said.err
    assert "CHOSEN ALONE" in said.out
    record = json.loads((tmp_path / "out.gguf.requantized.json").read_text())
    assert [(each["name"], each["share"]) for each in record["sent"]] == [
        ("v1.gguf", 0.75),
        ("v2.gguf", 0.25),
    ]
    assert all(0 < each["alone_bytes"] <= each["delta_bytes"] for each in record["sent"])
    first, measured = out.read_bytes(), _times(tmp_path / "calibration")
    assert measured
    files = ["--installed", str(folder / "v2.gguf"), "--also", f"{folder / 'v1.gguf'}=75%"]
    rest = ["--out", str(out), "--unjudged", "--budget", "12%", "--force", "--json"]
    assert main(_command(folder, *files, *rest)) == 0
    again = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == first
    assert again["sent"] == record["sent"]
    assert _times(tmp_path / "calibration") == measured
