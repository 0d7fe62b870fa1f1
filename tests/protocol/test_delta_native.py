import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hatch_build import FOLDER, LIBRARY, build_library
from protocol.delta import native

ROOT = Path(__file__).parent.parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def _loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WHIMBREL_NATIVE", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder like protocol/delta/native, with the C files about the library itself; below a root of its own."""
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    for name in ("whimbrel.h", "abi.c", "processor.c"):
        shutil.copy(ROOT / FOLDER / name, folder)
    return folder


def compiled(folder: Path) -> Path:
    root = folder.parents[len(FOLDER.parts) - 1]
    assert build_library(root, root / LIBRARY)
    return root / LIBRARY


@needs_compiler
def test_the_library_of_the_working_tree_is_used() -> None:
    library = native.library()
    assert library is not None
    assert library.whimbrel_abi_version() == native.ABI_VERSION
    assert native.library() is library


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIMBREL_NATIVE", "0")
    assert native.library() is None


def test_an_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIMBREL_NATIVE", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        native.library()


def test_a_pure_installation_uses_the_reference_without_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libwhimbrel_delta.so")
    assert native.library() is None  # a warning would fail the test


@needs_compiler
def test_a_library_with_another_abi_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, sources: Path
) -> None:
    header = sources / "whimbrel.h"
    changed, count = re.subn(r"(#define WHIMBREL_ABI_VERSION) .*", r"\1 UINT32_C(9999)", header.read_text())
    assert count == 1
    header.write_text(changed)
    monkeypatch.setattr(native, "LIBRARY", compiled(sources))
    with pytest.warns(RuntimeWarning, match=f"ABI version 9999, and this package needs {native.ABI_VERSION}"):
        assert native.library() is None


@needs_compiler
def test_a_library_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    (sources / "abi.c").write_text("typedef int nothing;\n")
    monkeypatch.setattr(native, "LIBRARY", compiled(sources))
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded.*whimbrel_abi_version"):
        assert native.library() is None


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libwhimbrel_delta.so"
    path.write_bytes(b"\x7fELF, but cut off")
    monkeypatch.setattr(native, "LIBRARY", path)
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert native.library() is None


def _has_avx2() -> bool:
    flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and {"avx2", "bmi1", "bmi2", "abm"} <= set(flags[1].split())


@needs_compiler
def test_the_level_is_what_the_processor_has_unless_the_baseline_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, sources: Path
) -> None:
    # A copy: lowering the level of the library that other tests use would make them test less.
    monkeypatch.setattr(native, "LIBRARY", compiled(sources))
    library = native.library()
    assert library is not None
    assert library.whimbrel_level() == int(_has_avx2())
    native.library.cache_clear()
    monkeypatch.setenv("WHIMBREL_NATIVE", "baseline")
    assert native.library() is not None
    assert library.whimbrel_level() == 0


ENCODE = """
import hashlib
import numpy as np
from protocol.delta.context import ContextModel
from protocol.delta.layouts import LAYOUTS
from protocol.delta.runs import ContextRun, Flag
from protocol.tensors.regions import Layout

rng = np.random.default_rng(1)
for name in (Layout.Q4_0, Layout.Q8_0, Layout.Q6_K, Layout.F32):
    layout = LAYOUTS[name]
    old = rng.integers(0, 128, 640 * layout.block_bytes, np.uint8)
    new = old ^ (rng.integers(0, 16, len(old), np.uint8) == 0)
    row = 10 * layout.codes.count
    run = ContextRun(layout.number, Flag.BASE | Flag.START | Flag.DRIFT, 0, 640, row, 0, 0, None, None)
    model = ContextModel()
    model.reset()
    print(hashlib.sha256(model.encode([run], old.tobytes(), new.tobytes())).hexdigest())
"""


@needs_compiler
def test_the_coder_gives_the_same_with_and_without_avx2() -> None:
    answers = [
        subprocess.run(
            [sys.executable, "-c", ENCODE],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"WHIMBREL_NATIVE": choice},
        ).stdout
        for choice in ("1", "baseline")
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0].split())) == 4
    if platform.machine() == "x86_64" and shutil.which("objdump"):
        command = ["objdump", "-d", str(ROOT / LIBRARY)]
        assert "ymm" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_compiler
def test_other_threads_run_while_the_library_computes() -> None:
    # PyDLL holds the interpreter's lock during a call, CDLL gives it up.
    library = native.library()
    assert isinstance(library, ctypes.CDLL)
    assert not isinstance(library, ctypes.PyDLL)


def test_the_header_and_the_loader_name_the_same_abi_version() -> None:
    header = (ROOT / FOLDER / "whimbrel.h").read_text()
    found = re.search(r"#define WHIMBREL_ABI_VERSION UINT32_C\((\d+)\)", header)
    assert found is not None
    assert int(found[1]) == native.ABI_VERSION


def test_importing_the_loader_brings_in_neither_numpy_nor_the_codec() -> None:
    program = "import sys, protocol.delta.native; print('numpy' in sys.modules, 'protocol.delta.codecs' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == ["False", "False"]
