"""A release goes to the tiers that have room for it, and is refused for the others before it is published, with the number that broke."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import RequestError
from protocol.tensors import BytesSource, parse_gguf
from server import operations
from server.cli import main
from server.tiers.files import Measured, Tier, read_tiers
from server.tiers.fit import Subject, fit
from server.tiers.needs import ModelNeeds, llama_needs, onnx_needs
from tests.server import model_damage
from tests.server.model_damage import Description
from tests.server.samples import write_health, write_model

MB = 1 << 20
NEEDS = ModelNeeds(
    weights_bytes=400 * MB,
    parameters=800 * MB,
    cache_token_bytes=MB // 8,
    logits_token_bytes=MB // 8,
    fixed_bytes=80 * MB,
)


def tier(**changes: Any) -> Tier:
    return Tier(**{"memory_mb": 1000, "disk_mb": 2000, "runtime": "llama", **changes})


def subject(**changes: Any) -> Subject:
    return Subject(**{"runtime": "llama", "needs": NEEDS, **changes})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A server with two tiers of the runtime onnx."""
    operations.init_repository(tmp_path / "server", "lab", port=0)
    write_tier(tmp_path / "server", "small", 1000)
    write_tier(tmp_path / "server", "large", 4000)
    return tmp_path / "server"


def write_tier(home: Path, name: str, memory_mb: int, *lines: str) -> Path:
    (home / "tiers").mkdir(exist_ok=True)
    path = home / "tiers" / f"{name}.toml"
    path.write_text("\n".join([f"memory_mb = {memory_mb}", "disk_mb = 8000", 'runtime = "onnx"', *lines, ""]))
    return path


def add(home: Path, version: str, memory_mb: int, **options: Any) -> list[str]:
    model, health = write_model(home.parent / "m.onnx", 1), write_health(home.parent / "health.json")
    record = operations.add_release(
        home,
        "digits",
        version,
        [model],
        runtime="onnx",
        health=health,
        memory_bytes=memory_mb * MB,
        **options,
    )
    return record.release.resources.tiers


def test_a_release_22_percent_over_a_tier_is_refused_for_it_and_goes_to_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, health = write_model(home.parent / "m.onnx", 1), write_health(home.parent / "health.json")
    command = ["release", "add", "digits", "v1", str(model), "--runtime", "onnx", "--health", str(health)]
    assert main([*command, "--memory-bytes", str(1220 * MB), "--dir", str(home)]) == 0
    text = capsys.readouterr().out
    assert "For tier large\n" in text
    assert (
        "Refused for small: 1220.0 MB (stated): 1220.0 MB of memory, 22 % over the 1000 MB of the tier"
        in text
    )
    assert operations.publish_release(home, "digits", "v1").release.resources.tiers == ["large"]
    assert main(["tiers", "check", "digits", "v1", "--dir", str(home), "--json"]) == 0
    found = {each["tier"]: each["fits"] for each in json.loads(capsys.readouterr().out)}
    assert found == {"large": True, "small": False}


def test_the_version_that_answers_during_the_swap_counts(home: Path) -> None:
    assert add(home, "v1", 600) == ["large", "small"]
    operations.publish_release(home, "digits", "v1")
    assert add(home, "v2", 620) == ["large"]  # 600 and 620 are 22 % more than 1000
    write_tier(home, "small", 1000, "stop_first = true")
    assert add(home, "v2", 620) == ["large", "small"]


def test_a_release_that_fits_none_of_its_tiers_is_refused(home: Path) -> None:
    with pytest.raises(RequestError, match=r"fits no tier; small: 1220\.0 MB .* 22 % over the 1000 MB"):
        add(home, "v1", 1220, tiers=["small"])
    with pytest.raises(RequestError, match="fits no tier"):
        add(home, "v1", 9000)
    with pytest.raises(RequestError, match="there is no tier tiny"):
        add(home, "v1", 10, tiers=["tiny"])
    assert operations.list_releases(home) == []


def test_a_draft_is_judged_again_when_it_is_published(home: Path) -> None:
    assert add(home, "v1", 600) == ["large", "small"]
    write_tier(home, "small", 500)
    with pytest.raises(RequestError, match=r"does not fit tier small: .* 20 % over the 500 MB"):
        operations.publish_release(home, "digits", "v1")


def test_without_tiers_a_release_is_for_those_that_it_names(tmp_path: Path) -> None:
    operations.init_repository(tmp_path / "server", "lab", port=0)
    assert add(tmp_path / "server", "v1", 9000, tiers=["anything"]) == ["anything"]
    assert add(tmp_path / "server", "v2", 9000) == []


def test_what_would_fit_is_said() -> None:
    # 400 of weights, 80 of runtime, 512 tokens with an eighth for the cache and three for logits: 736.
    found = fit(subject(), "pi", tier(memory_mb=600))
    assert found.model_bytes == 736 * MB
    assert found.would_fit == [
        "a context of 192 tokens (context_tokens)",
        "a quantization of 2.63 bits a weight (Q2_K), some 263.0 MB",
    ]
    assert fit(subject(), "pi", tier(memory_mb=600, context_tokens=192)).is_good
    swapped = fit(subject(), "pi", tier(), [subject()])
    assert swapped.broken[0].percent_over == pytest.approx(47.2)
    assert swapped.would_fit[0] == "stopping the old version first (stop_first = true): 736.0 MB"
    assert fit(subject(), "pi", tier(stop_first=True), [subject()]).is_good


def test_an_onnx_model_takes_a_runtime_and_one_and_a_half_times_its_files() -> None:
    assert onnx_needs(100 * MB).memory_bytes(0) == 230 * MB


def test_disk_and_latency_are_budgets_too() -> None:
    found = fit(
        subject(),
        "pi",
        tier(disk_mb=700, memory_gb_per_s=2.0, token_ms_max=150.0),
        [subject(stated_bytes=MB)],
    )
    assert [each.budget for each in found.broken] == ["disk", "latency"]
    assert found.disk_bytes == 801 * MB
    assert found.token_ms == pytest.approx(1000 * 400 * MB / 2e9)
    assert [each.budget for each in fit(subject(runtime="onnx"), "pi", tier()).broken] == ["runtime"]


def test_what_was_measured_counts_instead_of_the_formulas() -> None:
    known = Measured(sha256="ab" * 32, memory_mb=1220, tokens_per_s=10.0)
    found = fit(subject(sha256="ab" * 32), "pi", tier(measured=[known], memory_gb_per_s=100.0))
    assert (found.source, found.model_bytes, found.token_ms) == ("measured", 1220 * MB, 100.0)
    assert found.broken[0].detail.endswith("22 % over the 1000 MB of the tier")
    assert fit(subject(), "pi", tier(measured=[known])).source == "modelled"


def test_the_needs_of_a_text_model_come_from_its_file(tmp_path: Path) -> None:
    more = {
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.embedding_length": 256,
    }
    path = model_damage.write_language_model(
        tmp_path / "m.gguf", model_damage.base_weights(), about=Description(more=more)
    )
    data = path.read_bytes()
    needs = llama_needs(parse_gguf(BytesSource(data)), len(data))
    assert needs.cache_token_bytes == model_damage.LAYERS * 2 * (32 + 32) * 2
    assert needs.logits_token_bytes == 4 * model_damage.TOKENS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory_mb = \n", r"pi\.toml: .*line 1.*expected TOML"),
        (
            'memory_mb = 10\ndisk_mb = "much"\nruntime = "onnx"\n',
            r"pi\.toml line 2: Expected `int`, got `str`",
        ),
        ('memory_mb = 10\ndisk_mb = 0\nruntime = "onnx"\n', r"pi\.toml line 2: Expected `int` >= 1"),
        (
            'memory_mb = 10\nruntime = "onnx"\n',
            r"pi\.toml: .*missing required field `disk_mb`.*docs/tiers\.md",
        ),
        (
            'memory_mb = 10\ndisk_mb = 10\nruntime = "tflite"\n',
            r"pi\.toml line 3: Invalid enum value 'tflite'",
        ),
        (
            'memory_mb = 10\ndisk_mb = 10\nruntime = "onnx"\n\nspeed = 3\n',
            r"pi\.toml line 5: .*unknown field `speed`",
        ),
        (
            'memory_mb = 1\ndisk_mb = 1\nruntime = "onnx"\n[[measured]]\nsha256 = "'
            + "ab" * 32
            + '"\n[[measured]]\nsha256 = "x"\n',
            r"pi\.toml line 7: ",
        ),
        ("\xff", r"pi\.toml line 1: expected UTF-8"),
    ],
)
def test_a_malformed_tier_is_refused_with_the_line_and_what_was_expected(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "tiers").mkdir()
    (tmp_path / "tiers" / "pi.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=words):
        read_tiers(tmp_path)


def test_the_commands_show_tiers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tier(home, "small", 1000, "memory_gb_per_s = 4.0", "token_ms_max = 80.0")
    assert main(["tiers", "list", "--dir", str(home)]) == 0
    assert "4 GB/s" in capsys.readouterr().out
    assert main(["tiers", "show", "small", "--dir", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ms_max"] == 80.0
    assert main(["tiers", "show", "tiny", "--dir", str(home)]) == 1
    assert "known are large, small" in capsys.readouterr().err
