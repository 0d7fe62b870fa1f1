"""Figures for Prometheus. The only importer of `prometheus_client`."""

from collections.abc import Iterable
from typing import Final

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.coordinator import Coordinator
from server.runtime import Server
from server.web.access import Viewer
from server.web.pictures import air_bytes
from server.web.problems import RESPONSES
from server.web.views import AirBytes

router = APIRouter(responses=RESPONSES)

VERSIONS_MAX: Final = 200
"""Series of versions: any client of the broker can invent one."""


class FleetCollector(Collector):
    """What a server knows of its fleet, at the moment of the scrape.

    Args:
        server: Which one.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        status = self._server.status()
        yield _gauge("whimbrel_broker_connected", "Whether the server has its broker", status["is_connected"])
        yield _gauge("whimbrel_devices", "Devices that ever reported", status["devices"])
        yield _gauge("whimbrel_devices_online", "Devices that are connected", status["devices_online"])
        yield _labelled(
            "whimbrel_devices_state", "Devices by the state of their agent", ["state"], status["states"]
        )
        versions = dict(sorted(status["versions"].items(), key=lambda item: -item[1])[:VERSIONS_MAX])
        yield _labelled("whimbrel_devices_version", "Devices by what they run", ["version"], versions)
        members = GaugeMetricFamily(
            "whimbrel_rollout_devices",
            "Devices of a rollout by what became of them",
            labels=["rollout", "family", "version", "state", "status"],
        )
        for rollout in status["rollouts"][-50:]:
            for name, count in rollout["counts"].items():
                labels = [rollout["id"], rollout["family"], rollout["version"], rollout["state"], name]
                members.add_metric(labels, count)
        yield members
        air: AirBytes = self._server.look(_air)
        yield _gauge(
            "whimbrel_air_received_bytes", "Chunk payloads that devices took from the air", air.received_bytes
        )
        yield _gauge("whimbrel_air_full_bytes", "What whole files would have taken", air.full_bytes)
        yield _gauge("whimbrel_cached_bytes", "Bytes that the broker should retain", status["cached_bytes"])
        yield from _webhooks(self._server)
        for name, value in status["counters"].items():
            yield CounterMetricFamily(f"whimbrel_server_{name}", "Since the start of the server", value=value)


def _webhooks(server: Server) -> Iterable[Metric]:
    waiting = GaugeMetricFamily(
        "whimbrel_webhook_waiting", "Alerts that wait for a webhook", labels=["webhook"]
    )
    attempts = CounterMetricFamily(
        "whimbrel_webhook_attempts",
        "What became of attempts to send an alert, since the start of the server",
        labels=["webhook", "outcome"],
    )
    for standing, counters in server.webhooks():
        waiting.add_metric([standing.name], standing.waiting)
        for outcome, count in counters.items():
            attempts.add_metric([standing.name, outcome], count)
    yield waiting
    yield attempts


def _air(coordinator: Coordinator) -> AirBytes:
    return air_bytes(coordinator.campaigns.values())


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _labelled(name: str, text: str, labels: list[str], values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values.items():
        family.add_metric([label], value)
    return family


@router.get("/metrics", response_class=Response)
def metrics(request: Request, _: Viewer) -> Response:
    """Figures in the text format of Prometheus; a scraper sends a token of a viewer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(request.app.state.server))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
