import json

import msgspec
import pytest

from protocol.errors import ReleaseError
from protocol.ids import digest_of
from protocol.release import (
    Release,
    ReleaseFile,
    Resources,
    decode_health_plan,
    decode_release,
    encode_release,
    release_digest,
    version_tuple,
)
from tests.device.harness import health

RELEASE = Release(
    family="digits",
    version="v1",
    runtime="onnx",
    runtime_version_min="1.26",
    files=[ReleaseFile(name="model.onnx", length=5, sha256=digest_of(b"model"))],
    resources=Resources(memory_bytes=1, tiers=["pi"]),
    health=health(),
)


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(encode_release(RELEASE)), **fields}).encode()


def test_a_release_comes_back_as_it_was_written_and_has_one_digest() -> None:
    assert decode_release(encode_release(RELEASE)) == RELEASE
    assert release_digest(decode_release(encode_release(RELEASE))) == release_digest(RELEASE)


@pytest.mark.parametrize(
    "fields",
    [
        {"v": 2},
        {"family": "../etc"},
        {"version": "V1"},
        {"runtime": "torch"},
        {"runtime_version_min": "new"},
        {"files": []},
        {"files": [{"name": "../x", "length": 1, "sha256": digest_of(b"")}]},
        {"files": [{"name": "x", "length": -1, "sha256": digest_of(b"")}]},
        {"files": [{"name": "x", "length": 1, "sha256": digest_of(b"")}] * 2},
        {"health": {"prompts": [], "latency_p99_ms_max": 1, "memory_peak_bytes_max": 1}},
        {"scorecard_sha256": "no"},
        {"provenance_sha256": "no"},
    ],
)
def test_a_malformed_release_is_refused_and_the_field_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(ReleaseError) as caught:
        decode_release(changed(**fields))
    name = next(iter(fields))
    assert name in str(caught.value) or name.rstrip("s") in str(caught.value)


def test_a_health_plan_with_an_unknown_field_is_refused_with_its_source() -> None:
    plan = {"prompts": [], "latency_p99_ms_max": 1, "memory_peak_bytes_max": 1, "latancy": 1}
    with pytest.raises(ReleaseError, match=r"health\.json"):
        decode_health_plan(json.dumps(plan).encode(), "health.json")


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.10"), ("1", "1.0.1"), ("0.3.36", "0.4"), ("1.26.0rc1", "1.27")]
)
def test_runtime_versions_compare_by_number(older: str, newer: str) -> None:
    assert version_tuple(older) < version_tuple(newer)


def test_a_release_without_provenance_has_the_bytes_that_it_always_had() -> None:
    assert b"provenance" not in encode_release(RELEASE)
    said = msgspec.structs.replace(RELEASE, provenance_sha256=digest_of(b"statement"))
    assert decode_release(encode_release(said)) == said
    assert release_digest(said) != release_digest(RELEASE)


def with_files(*roles: str | None) -> dict[str, object]:
    files = [
        {"name": f"{number}.gguf", "length": 1, "sha256": digest_of(b"")} for number in range(len(roles))
    ]
    return {
        "files": [file | ({"role": role} if role else {}) for file, role in zip(files, roles, strict=True)]
    }


def test_a_file_with_a_role_makes_a_description_that_older_agents_refuse_by_its_version() -> None:
    release = decode_release(changed(v=2, runtime="llama", **with_files(None, None, "adapter")))
    assert release.adapter == release.files[2]
    assert json.loads(encode_release(release))["v"] == 2
    assert decode_release(encode_release(RELEASE)).adapter is None
    assert b"role" not in encode_release(RELEASE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"v": 1, "runtime": "llama", **with_files(None, "adapter")}, "of version 1, its files need 2"),
        ({"v": 2, "runtime": "llama", **with_files(None, None)}, "of version 2, its files need 1"),
        ({"v": 3, "runtime": "llama", **with_files(None, "adapter")}, "of version 3, understood are 1 and 2"),
        ({"v": 2, "runtime": "onnx", **with_files(None, "adapter")}, "the runtime onnx has no adapters"),
        ({"v": 2, "runtime": "llama", **with_files("adapter")}, "one adapter is allowed, behind the model"),
        ({"v": 2, "runtime": "llama", **with_files(None, "adapter", "adapter")}, "one adapter is allowed"),
        ({"v": 2, "runtime": "llama", **with_files(None, "draft")}, r"\$\.files\[1\]\.role"),
    ],
)
def test_roles_that_say_nothing_a_runtime_could_do_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ReleaseError, match=message):
        decode_release(changed(**fields))
