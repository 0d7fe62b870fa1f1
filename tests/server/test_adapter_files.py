"""Which adapters are taken into a release, and what is said of those that are not."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.gguf_files import Stored, read_stored, write_gguf
from protocol.errors import WhimbrelError
from protocol.release import Release, TextPrompt, decode_release, encode_release
from server.adapters.blobs import FolderBlobs
from server.cli import main
from server.operations import init_repository
from server.releases.importer import ADAPTER_VERSION_MIN, import_release
from tests.adapters import MATRICES, RANK, Parts, adapter_parts, write_adapter, write_parts
from tests.models import write_classifier, write_health_plan, write_language_model

QUERY = MATRICES[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("model") / "base.gguf", 1)


def health(folder: Path) -> Path:
    golden = TextPrompt(name="golden", prompt="a", completion="b", logprob_mean_min=-50.0)
    return write_health_plan(folder / "health.json", prompts=[golden])


def imported(folder: Path, model: Path, adapter: Path, oldest: str = "") -> Release:
    blobs = FolderBlobs(folder / "blobs")
    return import_release(
        blobs,
        family="f",
        version="1",
        files=[model],
        runtime="llama",
        health=health(folder),
        adapter=adapter,
        runtime_version_min=oldest,
    )


def test_an_adapter_is_a_file_with_a_role_in_a_description_that_older_agents_refuse(
    tmp_path: Path, model: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora.gguf", model, 1)
    release = imported(tmp_path, model, adapter)
    assert [(file.name, file.role) for file in release.files][1] == ("lora.gguf", "adapter")
    assert release.adapter == release.files[1]
    assert (release.v, release.runtime_version_min) == (2, ADAPTER_VERSION_MIN)
    assert decode_release(encode_release(release)) == release


def _without(name: str) -> Callable[[Parts], Parts]:
    return lambda parts: {each: values for each, values in parts.items() if each != name}


def _with(name: str, shape: tuple[int, ...]) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, name: np.zeros(shape, np.float32)}


def _renamed(parts: Parts) -> Parts:
    return {name.replace("blk.1.", "blk.7."): values for name, values in parts.items()}


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        pytest.param(None, {"general": "model"}, r"no adapter: general\.type is 'model'", id="a model"),
        pytest.param(
            None, {"kind": "control_vector"}, r"adapter\.type is 'control_vector', known is 'lora'", id="kind"
        ),
        pytest.param(None, {"architecture": "qwen2"}, r"'qwen2', base\.gguf is 'llama'", id="architecture"),
        pytest.param(_without(f"{QUERY}.lora_b"), {}, r"no tensor blk\.0\.attn_q\.weight\.lora_b", id="half"),
        pytest.param(_with("blk.0.attn_norm.weight", (64,)), {}, "ends with neither", id="a norm"),
        pytest.param(
            _renamed, {}, r"changes blk\.7\.attn_q\.weight, which base\.gguf does not have", id="matrix"
        ),
        pytest.param(
            _with(f"{QUERY}.lora_a", (RANK, 32)),
            {},
            "attn_q.weight of base.gguf is 64 x 64; factors of rank 4 are 4 x 64 and 64 x 4, here are 4 x 32 and 64 x 4",
            id="width",
        ),
        pytest.param(_with(f"{QUERY}.lora_b", (64, 3)), {}, "rank 3 are 3 x 64 and 64 x 3", id="two ranks"),
        pytest.param(_with(f"{QUERY}.lora_b", (64,)), {}, "its factors 4 x 64 and 64", id="a vector"),
        pytest.param(lambda _parts: {}, {}, "changes nothing", id="nothing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_copied(
    tmp_path: Path, model: Path, change: Callable[[Parts], Parts] | None, keys: dict[str, str], message: str
) -> None:
    parts = adapter_parts(model, 1)
    adapter = write_parts(tmp_path / "lora.gguf", parts if change is None else change(parts), **keys)
    with pytest.raises(WhimbrelError, match=message) as caught:
        imported(tmp_path, model, adapter)
    assert str(adapter) in str(caught.value)
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


def test_an_adapter_of_the_embedding_needs_an_output_of_its_own(tmp_path: Path, model: Path) -> None:
    """llama.cpp would look for the factors of the output there, and abort: with it the process of the trial."""
    rows, columns = 264, 64
    parts = {
        "token_embd.weight.lora_a": np.zeros((rows, RANK), np.float32),
        "token_embd.weight.lora_b": np.zeros((columns, RANK), np.float32),
    }
    adapter = write_parts(tmp_path / "lora.gguf", parts)
    with pytest.raises(
        WhimbrelError, match=r"which is the output of base\.gguf, too: llama\.cpp dies of such"
    ):
        imported(tmp_path, model, adapter)
    output = Stored("output.weight", np.zeros((rows, columns), np.float32), gguf.GGMLQuantizationType.F32)
    untied = tmp_path / "untied.gguf"
    write_gguf(model, untied, [*read_stored(model), output], {})
    assert imported(tmp_path, untied, adapter).adapter is not None
    parts["token_embd.weight.lora_a"] = parts["token_embd.weight.lora_a"].T
    with pytest.raises(
        WhimbrelError, match="factors of rank 4 are 264 x 4 and 64 x 4, here are 4 x 264 and 64 x 4"
    ):
        imported(tmp_path, untied, write_parts(adapter, parts))


def test_a_damaged_or_missing_adapter_is_named(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "lora.gguf", model, 1)
    data = adapter.read_bytes()
    for damaged in (data[:-300], b"GGUF", b""):
        adapter.write_bytes(damaged)
        with pytest.raises(WhimbrelError, match=r"lora\.gguf"):
            imported(tmp_path, model, adapter)
    adapter.unlink()
    with pytest.raises(WhimbrelError, match=r"lora\.gguf: No such file"):
        imported(tmp_path, model, adapter)


def test_what_cannot_have_an_adapter_says_so(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "lora.gguf", model, 1)
    with pytest.raises(
        WhimbrelError, match=r"adapters need llama-cpp-python 0\.3\.36 or later, 0\.3\.1 is older"
    ):
        imported(tmp_path, model, adapter, "0.3.1")
    with pytest.raises(WhimbrelError, match=r"is an adapter, and no model by itself \(give its model"):
        imported(tmp_path, adapter, model)
    classifier = write_classifier(tmp_path / "model.onnx", 1)
    with pytest.raises(WhimbrelError, match=r"lora\.gguf: the runtime onnx has no adapters"):
        import_release(
            FolderBlobs(tmp_path / "blobs"),
            family="f",
            version="1",
            files=[classifier],
            runtime="onnx",
            health=write_health_plan(tmp_path / "classes.json"),
            adapter=adapter,
        )


@pytest.mark.parametrize("oldest", [ADAPTER_VERSION_MIN, "0.4"])
def test_a_later_runtime_may_be_asked_for(tmp_path: Path, model: Path, oldest: str) -> None:
    adapter = write_adapter(tmp_path / "lora.gguf", model, 1)
    assert imported(tmp_path, model, adapter, oldest).runtime_version_min == oldest


def test_an_adapter_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "lora.bin", model, 1)
    assert imported(tmp_path, model, adapter).files[1].name == "lora.bin"


def test_the_command_takes_an_adapter_and_shows_which_file_it_is(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "server"
    init_repository(folder, "lab")
    adapter = write_adapter(tmp_path / "lora.gguf", model, 1)
    command = [
        "release",
        "add",
        "f",
        "1",
        str(model),
        "--runtime",
        "llama",
        "--health",
        str(health(tmp_path)),
    ]
    assert main([*command, "--adapter", str(adapter), "--dir", str(folder)]) == 0
    assert "in 2 file(s)" in capsys.readouterr().out
    assert main(["release", "show", "f", "1", "--dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "lora.gguf (adapter)" in shown
    assert "llama from 0.3.36 on" in shown
    assert main(["diagnose", "f", "1", "1", "--dir", str(folder)]) == 1
    assert "f 1 has the adapter lora.gguf: what it changes is not diagnosed" in capsys.readouterr().err
