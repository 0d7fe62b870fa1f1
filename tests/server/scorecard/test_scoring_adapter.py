"""Scorecards of a release with an adapter: it is scored as devices run it."""

from pathlib import Path

import pytest

from protocol.errors import EngineError
from protocol.release import TextPrompt
from protocol.tensors import BytesSource, parse_gguf
from server import operations
from server.scorecard.card import Scorecard
from server.scorecard.keeping import Plan
from server.scorecard.suites import Asking
from server.scorecard.verdict import Limits
from server.scorecard.work import Load, MemoryOrder, Model, SpeedOrder
from server.scorecard.worker import Worker
from server.scoring import score_release
from tests.adapters import write_adapter, write_merged
from tests.models import write_health_plan, write_language_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_language_model(tmp_path / "base.gguf", 3)


def _score(home: Path, against: str) -> Scorecard:
    plan = Plan(
        asking=Asking(),
        limits=Limits(),
        threads=1,
        context_tokens=64,
        speed=SpeedOrder(prompt_tokens=8, prompt_runs=1, decode_tokens=4, loads=2),
        memory=MemoryOrder(contexts=(32,)),
    )
    return score_release(home, "tiny", "adapted", suites=[], plan=plan, against=against).card


def test_a_release_with_an_adapter_is_scored_as_the_merged_model_and_not_as_its_base(
    tmp_path: Path, base: Path
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab")
    adapter = write_adapter(tmp_path / "lora.gguf", base, 1)
    merged = write_merged(tmp_path / "merged.gguf", base, adapter)
    golden = TextPrompt(name="once", prompt="once upon", completion=" a time", logprob_mean_min=-50.0)
    health = write_health_plan(tmp_path / "health.json", prompts=[golden])
    for version, model, beside in (
        ("base", base, None),
        ("merged", merged, None),
        ("adapted", base, adapter),
    ):
        operations.add_release(home, "tiny", version, [model], runtime="llama", health=health, adapter=beside)
    card = _score(home, "merged")
    assert card.missing_count == 0
    assert card.drift is not None
    assert card.drift.texts is not None
    assert card.drift.texts.mean.value < 1e-4
    assert [file.role for file in card.subject.files][1] == "adapter"
    weights = [
        sum(region.length // 4 for region in parse_gguf(BytesSource(path.read_bytes())).tensors)
        for path in (base, adapter)
    ]
    assert card.resources.parameters == sum(weights)
    from_base = _score(home, "base").drift
    assert from_base is not None
    assert from_base.texts is not None
    assert from_base.texts.mean.value > 0.1


def test_an_adapter_that_does_not_load_is_told_apart_from_the_model(tmp_path: Path, base: Path) -> None:
    other = write_adapter(tmp_path / "lora.gguf", base, 1)
    other.write_bytes(other.read_bytes().replace(b"llama", b"qwen2", 1))
    model = Model(path=str(base), runtime="llama", threads=1, context_tokens=64, adapter=str(other))
    with Worker(model) as worker, pytest.raises(EngineError, match=r"llama\.cpp cannot load the adapter"):
        worker.ask(Load())
