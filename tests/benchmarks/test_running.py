import sys
from pathlib import Path

import pytest

from benchmarks.contenders import Contender, contenders
from benchmarks.edits import write_random
from benchmarks.rows import Cost
from benchmarks.running import measured, open_files, run, sha256

MEGABYTE = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def cost(code: str) -> Cost:
    found = measured(python(code), 60)
    assert isinstance(found, Cost)
    return found


def test_peak_memory_is_that_of_the_process_alone() -> None:
    bare, large = cost("pass").peak_bytes, cost(f"b'x' * (100 * {MEGABYTE})").peak_bytes
    assert bare < 30 * MEGABYTE
    assert 95 * MEGABYTE < large - bare < 110 * MEGABYTE


def test_memory_of_worker_processes_is_added() -> None:
    worker = f"import time; x = bytearray(b'x' * (50 * {MEGABYTE})); time.sleep(0.5)"
    code = f"import subprocess, sys; c = [sys.executable, '-I', '-S', '-c', {worker!r}]\n"
    code += "for p in [subprocess.Popen(c) for _ in range(2)]: p.wait()"
    assert cost(code).peak_bytes > 110 * MEGABYTE


def test_cpu_time_is_counted() -> None:
    found = cost("import time\nwhile time.process_time() < 0.3: pass")
    assert 0.3 <= found.cpu_s < 2


def test_a_process_that_fails_says_why() -> None:
    found = measured(python("raise SystemExit('no such thing')"), 60)
    assert found == "exit code 1, no such thing"


def test_a_process_that_takes_too_long_is_ended() -> None:
    found = measured(python("import time; time.sleep(60)"), 0.2)
    assert isinstance(found, str)
    assert "exit code 124" in found


def test_a_program_that_is_not_there_is_an_error() -> None:
    assert measured(["no-such-program"], 60) == "no-such-program: No such file or directory"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "base", tmp_path / "new"
    write_random(1, paths[0], length=20_000)
    paths[1].write_bytes(paths[0].read_bytes()[:15_000] + b"something else")
    return paths


@pytest.mark.parametrize("contender", contenders(), ids=lambda contender: contender.name)
def test_every_method_gives_back_the_new_file(
    contender: Contender, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    row = run(contender, open_files("pair", *pair), tmp_path, 60)
    if contender.version is None:
        assert row.error == f"not installed: {contender.install}"
        assert row.patch_bytes is None
        return
    assert row.error == ""
    assert row.patch_bytes is not None
    assert row.new_sha256 == sha256(pair[1])
    assert row.build is not None
    assert row.apply is not None
    assert row.apply.peak_bytes > 0
    # All but xz, which does not see the base, find what is the same.
    assert (row.patch_bytes < 1000) == (contender.name != "xz")


def test_a_result_that_differs_is_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def copy(source: Path, out: Path) -> list[str]:
        return python(f"import shutil; shutil.copyfile({str(source)!r}, {str(out)!r})")

    wrong = Contender(
        "wrong",
        "1",
        "",
        lambda base, _new, patch: copy(base, patch),
        lambda _base, patch, out: copy(patch, out),
    )
    assert run(wrong, open_files("pair", *pair), tmp_path, 60).error == "the result is another file"
