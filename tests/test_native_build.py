"""How the C of the delta coder is compiled: by hatch_build.py, tools/environment.py and tools/wheels.py."""

import hashlib
import importlib.util
import json
import platform
import shutil
from pathlib import Path

import pytest

import hatch_build
from hatch_build import FOLDER, LIBRARY, BuildError, build_library
from tools import environment, wheels

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with the C sources, and what compiles them."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for path in (ROOT / FOLDER).glob("*.[ch]"):
        shutil.copy(path, tmp_path / FOLDER)
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_compiler
def test_an_error_in_the_c_code_is_shown_and_leaves_the_old_library(root: Path) -> None:
    library = root / LIBRARY
    library.write_bytes(b"the one before")
    (root / FOLDER / "broken.c").write_text("int broken(void) { return missing; }\n")
    with pytest.raises(BuildError, match=r"broken\.c.*missing"):
        build_library(root, library)
    assert library.read_bytes() == b"the one before"
    assert [path.name for path in library.parent.glob("*.so*")] == [library.name]


@needs_compiler
def test_a_function_that_nobody_defines_is_found_when_compiling(root: Path) -> None:
    (root / FOLDER / "caller.c").write_text(
        "int missing(void);\nint caller(void);\nint caller(void) { return missing(); }\n"
    )
    with pytest.raises(BuildError, match="missing"):
        build_library(root, root / LIBRARY)


@needs_compiler
def test_the_library_does_not_tell_where_it_was_built(root: Path) -> None:
    build_library(root, root / LIBRARY)
    assert str(root).encode() not in (root / LIBRARY).read_bytes()


def test_without_a_compiler_nothing_is_compiled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    monkeypatch.delenv("CC", raising=False)
    assert not build_library(root, root / LIBRARY)
    assert not (root / LIBRARY).exists()


def test_a_compiler_that_does_not_exist_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc -m32")
    with pytest.raises(BuildError, match="no-such-cc"):
        build_library(root, root / LIBRARY)


@pytest.mark.parametrize("target", ["aarch64", "aarch64-linux-gnu", "aarch64-linux-musl.1.2", "Pure"])
def test_an_unknown_target_is_refused(root: Path, target: str) -> None:
    with pytest.raises(BuildError, match="WHIMBREL_TARGET"):
        build_library(root, root / LIBRARY, target)


def test_the_tag_is_that_of_the_target() -> None:
    assert hatch_build.platform("aarch64-linux-gnu.2.17") == "manylinux_2_17_aarch64"
    assert hatch_build.platform("") == f"linux_{platform.machine()}"


@needs_compiler
def test_the_environment_compiles_when_a_source_changed_and_only_then(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lock = root / "some.lock"
    lock.touch()
    library, stamp = root / LIBRARY, root / "stamp"
    monkeypatch.setattr(environment, "ROOT", root)
    monkeypatch.setattr(environment, "LIBRARY", library)
    monkeypatch.setattr(environment, "STAMP", stamp)
    # What the lock pins is installed; otherwise pip would run.
    pinned = hashlib.sha256(lock.read_bytes() + (root / "pyproject.toml").read_bytes()).hexdigest()
    stamp.write_text(json.dumps({lock.name: pinned}))

    def is_compiled() -> bool:
        old = library.stat().st_ino if library.exists() else 0
        assert environment.main(lock) == 0
        return library.stat().st_ino != old

    assert is_compiled()
    assert not is_compiled()
    header = root / FOLDER / "whimbrel.h"
    header.write_text(header.read_text() + "\n")
    assert is_compiled()
    (root / FOLDER / "new.c").write_text("typedef int nothing;\n")
    assert is_compiled()
    assert not is_compiled()
    library.unlink()
    assert is_compiled()
    (root / FOLDER / "new.c").write_text("nonsense\n")
    assert environment.main(lock) != 0
    assert "nonsense" in capfd.readouterr().err
    (root / FOLDER / "new.c").unlink()
    assert is_compiled()


@needs_compiler
def test_a_library_for_newer_systems_or_another_processor_is_found_out(root: Path) -> None:
    # quick_exit has been in glibc 2.24 since its destructors changed.
    source = "#include <stdlib.h>\nvoid leave(void);\nvoid leave(void) { quick_exit(0); }\n"
    (root / FOLDER / "leave.c").write_text(source)
    build_library(root, root / LIBRARY)
    library, machine = (root / LIBRARY).read_bytes(), platform.machine()
    other = next(name for name in wheels.MACHINES if name != machine)
    assert wheels.problems(library, machine, (2, 17)) == ["it needs glibc 2.24"]
    assert wheels.problems(library, machine, (2, 24)) == []
    assert wheels.problems(library, other, (2, 24)) == [f"it is not a library for {other}"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang (make wheels)")
@pytest.mark.parametrize("target", wheels.TARGETS)
def test_the_wheels_of_a_release_keep_what_their_tags_promise(tmp_path: Path, target: str) -> None:
    wheels.check(wheels.build(tmp_path, target))
    assert len(list(tmp_path.iterdir())) == 1
