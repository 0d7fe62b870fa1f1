import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
    for name in ("whimbrel.h", "hot.h", "abi.c", "processor.c"):
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


HOT = """
#include "hot.h"

WHIMBREL_EXPORT uint64_t mixed(const uint32_t *values, uint64_t count);

static WHIMBREL_INLINE uint64_t mixed_body(const uint32_t *values, uint64_t count)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        sum += (uint64_t)values[i] * 2654435761u >> (values[i] & 31);
    }
    return sum;
}
WHIMBREL_HOT(uint64_t, mixed, (const uint32_t *values, uint64_t count), (values, count))
"""


@needs_compiler
def test_a_hot_loop_gives_the_same_with_and_without_avx2(sources: Path) -> None:
    (sources / "mixed.c").write_text(HOT)  # and no other line anywhere
    path = compiled(sources)
    library = ctypes.CDLL(str(path))
    library.mixed.restype = ctypes.c_uint64
    library.mixed.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    values = np.random.default_rng(1).integers(0, 1 << 32, 10_007, dtype=np.uint32)
    wide = values.astype(np.uint64)
    expected = int(((wide * 2654435761) >> (wide & 31)).sum())
    assert library.mixed(values.ctypes.data, len(values)) == expected
    library.whimbrel_use_every_processor()
    assert library.mixed(values.ctypes.data, len(values)) == expected
    if platform.machine() == "x86_64" and shutil.which("objdump"):
        code = subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True).stdout
        assert "ymm" in code


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
