"""Routes that look back: the audit trail, alerts, and how it goes with webhooks."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from server.alerts.records import Alert, Delivery, Sent
from server.audit import AuditRecord
from server.web.access import Approver, Operator, Viewer
from server.web.problems import RESPONSES

PAGE_MAX: Final = 500
_MS_MAX: Final = 1 << 53
"""Above every time, and exact in every program that reads JSON."""

router = APIRouter(prefix="/api/v1", responses=RESPONSES)
_Name = Annotated[str, Query(max_length=128)]


class AuditView(BaseModel):
    """Something that was done, or was tried and refused."""

    number: int = Field(
        description="from 1; records that are older than they are kept are not there any more"
    )
    at_ms: int
    kind: str = Field(description="page, token, command, server, or device")
    name: str = Field(description="of the user or the device; for commands the operating system's user")
    role: str = Field(description="of a user")
    address: str = Field(description="from which a browser or a program came")
    what: str = Field(description="kind of act, for example release.publish")
    on: str = Field(description="what it was done to")
    outcome: str = Field(description="done, waiting for signatures, or the code of why it was refused")
    text: str
    details: dict[str, float | int | str]


class AuditPage(BaseModel):
    """Acts, newest first."""

    records: list[AuditView]
    before: int | None = Field(description="to ask for the next page with; null at the end")


class DeliveryView(BaseModel):
    """What became of an alert on its way to one webhook."""

    webhook: str
    state: str = Field(description="waiting, delivered, or dropped")
    attempts: int
    tried_ms: int | None
    next_ms: int | None = Field(description="when it is tried next; null if it is not")
    status: int | None = Field(description="HTTP status that was answered last")
    error: str


class AlertView(BaseModel):
    """Something that was told, or is about to be."""

    id: str
    kind: str
    about: str = Field(description="for example a rollout")
    at_ms: int
    due_ms: int = Field(description="when it is told: alerts about devices wait for others to join them")
    text: str
    count: int = Field(description="devices that it is about")
    devices: list[str] = Field(description="the first of them")
    deliveries: list[DeliveryView] = Field(description="none where no webhook asks for it")


class WebhookView(BaseModel):
    """How it goes with one webhook."""

    name: str
    url: str = Field(description="without its path, which may be a secret")
    events: list[str]
    waiting: int
    delivered: int
    dropped: int
    next_ms: int | None
    failed: DeliveryView | None = Field(description="the last delivery that failed")


@router.get("/audit")
def audit(
    request: Request,
    _: Approver,
    who: _Name = "",
    what: _Name = "",
    since_ms: Annotated[int, Query(ge=0, le=_MS_MAX)] = 0,
    before: Annotated[int | None, Query(ge=1, le=_MS_MAX)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> AuditPage:
    """Who did what: by a user, device or `server`, of kinds that begin so, since then, before that number."""
    found = request.app.state.store.audit(
        since_ms=since_ms, who=who, what=what, before=before, count_max=limit + 1
    )
    page = found[:limit]
    return AuditPage(
        records=[_audit(each) for each in page], before=page[-1].number if len(found) > limit else None
    )


@router.get("/alerts")
def alerts(
    request: Request,
    _: Viewer,
    about: Annotated[str, Query(max_length=128, description="for example a rollout")] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> list[AlertView]:
    """Alerts, newest first, with what became of them."""
    return [_sent(each) for each in request.app.state.store.sent(about, limit)]


@router.get("/webhooks")
def webhooks(request: Request, _: Operator) -> list[WebhookView]:
    """Where alerts go."""
    settings = {each.name: each for each in request.app.state.server.config.webhooks}
    return [
        WebhookView(
            name=standing.name,
            url=settings[standing.name].shown_url,
            events=list(settings[standing.name].events),
            waiting=standing.waiting,
            delivered=standing.delivered,
            dropped=standing.dropped,
            next_ms=standing.next_ms,
            failed=None if standing.failed is None else _delivery(standing.failed),
        )
        for standing in request.app.state.store.standings(list(settings))
    ]


def _audit(record: AuditRecord) -> AuditView:
    return AuditView(
        number=record.number,
        at_ms=record.at_ms,
        kind=record.by.kind,
        name=record.by.name,
        role=record.by.role,
        address=record.by.address,
        what=record.what,
        on=record.on,
        outcome=record.outcome,
        text=record.text,
        details=record.details,
    )


def _sent(sent: Sent) -> AlertView:
    alert: Alert = sent.alert
    return AlertView(
        id=alert.id,
        kind=alert.kind,
        about=alert.about,
        at_ms=alert.at_ms,
        due_ms=alert.due_ms,
        text=alert.text,
        count=alert.count,
        devices=list(alert.devices),
        deliveries=[_delivery(each) for each in sent.deliveries],
    )


def _delivery(delivery: Delivery) -> DeliveryView:
    return DeliveryView(
        webhook=delivery.webhook,
        state=delivery.state,
        attempts=delivery.attempts,
        tried_ms=delivery.tried_ms or None,
        next_ms=delivery.next_ms if delivery.state == "waiting" else None,
        status=delivery.status or None,
        error=delivery.error,
    )
