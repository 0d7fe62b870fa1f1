"""Model files, health plans and repositories for the tests of the server: small, real, the same every time."""

import hashlib
import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from protocol.chunks import build_tree
from protocol.constants import CHUNK_BYTES
from protocol.ids import Family, Version, digest_of
from protocol.messages import Capacity, Report, UpdateReport
from protocol.release import (
    ClassPrompt,
    HealthPlan,
    Release,
    ReleaseFile,
    Resources,
    file_target,
    release_target,
)
from protocol.trust import Target
from server import operations
from server.ports import StoredBlob
from server.releases.catalog import Catalog, blob_target

DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000  # 2027-01-15


def write_model(path: Path, seed: int, side: int = 200) -> Path:
    """An ONNX file of one matrix; other seeds change a few of its weights."""
    weights = np.random.default_rng(7).standard_normal((side, side)).astype(np.float32)
    changed = np.random.default_rng(seed).integers(0, side * side, 50)
    weights.ravel()[changed] += np.float32(0.01)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, side])],
        [numpy_helper.from_array(weights, "w")],
    )
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def write_health(path: Path) -> Path:
    """A health plan with one prompt."""
    plan = {
        "prompts": [{"kind": "class", "name": "zero", "input": [0.0], "label": 1}],
        "latency_p99_ms_max": 100,
        "memory_peak_bytes_max": 1 << 30,
    }
    path.write_text(json.dumps(plan))
    return path


def publish_models(folder: Path, versions: dict[str, int], side: int = 200) -> dict[str, Path]:
    """Repository in `folder / "server"` with published versions of the family `digits`; seeds by version."""
    home = folder / "server"
    operations.init_repository(home, "lab", port=0)
    health = write_health(folder / "health.json")
    models = {}
    for version, seed in versions.items():
        models[version] = write_model(folder / f"digits-{version}.onnx", seed, side)
        operations.add_release(home, "digits", version, [models[version]], runtime="onnx", health=health)
        operations.publish_release(home, "digits", version)
    return models


def stored(data: bytes) -> StoredBlob:
    """What the blob store would say about `data`."""
    parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    tree, _ = build_tree(hashlib.sha256(part).digest() for part in parts)
    return StoredBlob(digest=digest_of(data), length=len(data), tree=tree)


def model_bytes(version: str) -> bytes:
    """Content of the only file of a paper release: three chunks."""
    return f"model {version} ".encode() * 20_000


def paper_release(version: str, tiers: tuple[str, ...] = ()) -> Release:
    """A release that exists on paper only."""
    data = model_bytes(version)
    prompt = ClassPrompt(name="zero", input=[0.0], label=1)
    return Release(
        family="digits",
        version=version,
        runtime="onnx",
        runtime_version_min="1.17",
        files=[ReleaseFile(name="model.onnx", length=len(data), sha256=digest_of(data))],
        resources=Resources(tiers=list(tiers)),
        health=HealthPlan(prompts=[prompt], latency_p99_ms_max=100, memory_peak_bytes_max=1 << 30),
    )


def paper_catalog(*releases: Release, extra: tuple[Target, ...] = (), refresh_ms: int = 1 << 52) -> Catalog:
    """A catalog in which `releases` are published."""
    targets = list(extra)
    for release in releases:
        path = release_target(Family(release.family), Version(release.version))
        targets.append(blob_target(path, stored(f"release {release.version}".encode())))
        blob = stored(model_bytes(release.version))
        targets.append(blob_target(file_target(blob.digest), blob))
    return Catalog.of({target.path: target for target in targets}, releases, refresh_ms)


def report(
    device: str,
    sequence: int,
    version: str,
    update: UpdateReport | None = None,
    *,
    files: dict[str, str] | None = None,
    tier: str = "",
    capacity: Capacity | None = None,
) -> Report:
    """What a device says that runs `version` of the paper family."""
    measured: dict[str, str] = {"model.onnx": digest_of(model_bytes(version))} if version else {}
    return Report(
        device=device,
        sequence=sequence,
        state="idle",
        family="digits",
        version=version,
        files=measured if files is None else files,
        tier=tier,
        capacity=capacity,
        update=update,
    )
