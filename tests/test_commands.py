"""The three commands together, as the README gives them to people: real processes, real files, a real broker."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import write_classifier, write_health_plan
from tests.server.brokers import free_port, stop, wait_until

BIN = Path(sys.executable).parent
WAIT_S = 60.0

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command that must end with 0; give back what it printed."""

    def run_command(name: str, *arguments: str) -> str:
        result = subprocess.run(
            [BIN / name, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run_command


@pytest.fixture
def server(tmp_path: Path, run: Run) -> Iterator[int]:
    """A server with two published versions; gives its port."""
    port = free_port()
    run("whimbrel", "init", "fleet", "--fleet", "lab")
    health = str(write_health_plan(tmp_path / "health.json"))
    for version, seed in (("v1", 1), ("v2", 2)):
        model = str(write_classifier(tmp_path / f"{version}.onnx", seed, hidden=4000))
        run(
            "whimbrel",
            "release",
            "add",
            "digits",
            version,
            model,
            "--runtime",
            "onnx",
            "--health",
            health,
            "--dir",
            "fleet",
        )
        run("whimbrel", "release", "publish", "digits", version, "--dir", "fleet")
    process = subprocess.Popen(
        [BIN / "whimbrel", "serve", "--dir", "fleet", "--port", str(port)], cwd=tmp_path
    )
    yield port
    stop(process)


def test_a_device_is_provisioned_updated_and_asked_with_the_commands_of_the_readme(
    tmp_path: Path, run: Run, server: int
) -> None:
    assert run("whimbrel", "score", "digits", "v1", "--dir", "fleet").startswith("digits v1: passed\n")
    run("whimbrel", "release", "export", "digits", "v1", "-o", "factory", "--dir", "fleet")
    (tmp_path / "device.toml").write_text(
        f'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\nbroker = "127.0.0.1:{server}"\n'
    )
    run("whimbrel-device", "provision", "--config", "device.toml", "--from", "factory")
    (tmp_path / "input.json").write_text(json.dumps([0.1, 0.1, 2.0] + [0.1] * 13))
    assert run("whimbrel-device", "infer", "--config", "device.toml", "--input", "input.json").strip() == "2"
    agent = subprocess.Popen(
        [BIN / "whimbrel-device", "run", "--config", "device.toml"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        run("whimbrel", "rollout", "start", "digits", "v2", "--canary", "1", "--dir", "fleet")

        def status() -> dict[str, object]:
            return dict(json.loads(run("whimbrel-device", "status", "--config", "device.toml", "--json")))

        assert wait_until(lambda: status()["active"] == "b", WAIT_S), status()
        rollouts = wait_until(
            lambda: "finished" in run("whimbrel", "rollout", "status", "--dir", "fleet"), WAIT_S
        )
        assert rollouts
        assert "pi-1" in run("whimbrel", "devices", "--dir", "fleet")
    finally:
        stop(agent)
    assert agent.returncode == 0
    assert run("whimbrel-device", "infer", "--config", "device.toml", "--input", "input.json").strip() == "2"


@pytest.mark.parametrize("name", ["whimbrel", "whimbrel-device", "whimbrel-sim"])
def test_every_command_explains_itself_and_refuses_nonsense_with_2(name: str) -> None:
    shown = subprocess.run([BIN / name, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "usage" in shown.stdout
    refused = subprocess.run([BIN / name, "nonsense"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
