"""Routes that look: the fleet, devices, rollouts, releases."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from protocol.ids import DeviceId
from server import operations
from server.coordinator import Coordinator
from server.overview import compare_with_before
from server.rollouts.campaign import Campaign
from server.web.access import Viewer, visit
from server.web.names import DeviceName, FamilyName, RolloutName, VersionName
from server.web.pictures import (
    MemberPage,
    device_page,
    device_story,
    fleet_picture,
    release_details,
    release_summary,
    rollout_details,
    rollout_list,
)
from server.web.problems import RESPONSES, NotFoundError, SignInError, TooManyError
from server.web.views import (
    DevicePage,
    DeviceStory,
    Fleet,
    ReleaseDetails,
    ReleaseSummary,
    RolloutDetails,
    RolloutSummary,
    Visitor,
)

MOMENTS_MAX: Final = 500
PAGE_MAX: Final = 1_000

router = APIRouter(prefix="/api/v1", responses=RESPONSES)
_Name = Annotated[str, Query(max_length=128)]


@router.get("/session", response_model=Visitor, responses={204: {"description": "nobody is signed in"}})
def session(request: Request) -> Visitor | Response:
    """Who is signed in."""
    try:
        visitor = visit(request)
    except SignInError:
        return Response(status_code=204)
    return Visitor(
        user=visitor.user.name,
        role=visitor.user.role,
        csrf=visitor.session.csrf,
        fleet=request.app.state.server.config.fleet,
    )


@router.get("/fleet")
def fleet(request: Request, _: Viewer) -> Fleet:
    """The fleet at a glance."""
    server, clock = request.app.state.server, request.app.state.clock
    host, port = server.broker_address

    def read(coordinator: Coordinator) -> Fleet:
        return fleet_picture(
            coordinator,
            server.config.fleet,
            f"{host}:{port}",
            clock.now_ms(),
            is_connected=server.is_connected,
        )

    picture: Fleet = server.look(read)
    return picture


@router.get("/devices")
def devices(
    request: Request,
    _: Viewer,
    family: _Name = "",
    version: _Name = "",
    state: _Name = "",
    tier: _Name = "",
    outcome: _Name = "",
    code: _Name = "",
    text: Annotated[str, Query(max_length=64, description="part of a device's name")] = "",
    after: Annotated[str, Query(max_length=64, description="last name of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> DevicePage:
    """Devices, by name; every filter that is given has to match."""
    wanted = {
        "family": family,
        "version": version,
        "state": state,
        "tier": tier,
        "outcome": outcome,
        "code": code,
    }
    page: DevicePage = request.app.state.server.look(
        lambda core: device_page(core, wanted, text, after, limit)
    )
    return page


@router.get("/devices/{device}")
def device(request: Request, device: DeviceName, _: Viewer) -> DeviceStory:
    """One device: what it reports, and its story."""
    name = DeviceId(device)

    def read(coordinator: Coordinator) -> object:
        record = coordinator.registry.get(name)
        return record if record.seen_ms else None

    record = request.app.state.server.look(read)
    if record is None:
        raise NotFoundError(f"no device {device[:80]!r} has reported")
    return device_story(record, request.app.state.store.device_events(name, MOMENTS_MAX))


@router.get("/rollouts")
def rollouts(request: Request, _: Viewer) -> list[RolloutSummary]:
    """All rollouts, newest first."""
    stored = request.app.state.store.rollouts()
    found: list[RolloutSummary] = request.app.state.server.look(lambda core: rollout_list(core, stored))
    return found


@router.get("/rollouts/{rollout}")
def rollout(
    request: Request,
    rollout: RolloutName,
    _: Viewer,
    status: _Name = "",
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> RolloutDetails:
    """One rollout: its waves, evidence, decisions and devices, those that failed first."""
    store, clock = request.app.state.store, request.app.state.clock
    stored = next((each for each in store.rollouts() if each.id == rollout), None)
    if stored is None:
        raise NotFoundError(f"there is no rollout {rollout}")
    decided, orders = store.decisions(rollout), len(store.orders(rollout))
    page = MemberPage(status, offset, limit)

    def read(coordinator: Coordinator) -> RolloutDetails:
        campaign = coordinator.campaigns.get(stored.id) or Campaign(
            stored
        )  # it may not have been taken up yet
        return rollout_details(campaign, decided, orders, clock.now_ms(), page)

    details: RolloutDetails = request.app.state.server.look(read)
    return details


@router.get("/releases")
def releases(request: Request, _: Viewer) -> list[ReleaseSummary]:
    """All releases, newest first."""
    records = request.app.state.store.releases()
    withdrawn = operations.is_withdrawn(request.app.state.server.config.folder, records)

    def read(coordinator: Coordinator) -> list[ReleaseSummary]:
        pairs = zip(reversed(records), reversed(withdrawn), strict=True)
        return [release_summary(coordinator, record, is_withdrawn=gone) for record, gone in pairs]

    found: list[ReleaseSummary] = request.app.state.server.look(read)
    return found


@router.get("/releases/{family}/{version}")
def release(request: Request, family: FamilyName, version: VersionName, _: Viewer) -> ReleaseDetails:
    """One release: its files, the deltas that lead to it, where it comes from."""
    folder = request.app.state.server.config.folder
    details = operations.show_release(folder, family, version)
    (is_withdrawn,) = operations.is_withdrawn(folder, [details.record])
    comparison = compare_with_before(folder, family, version)
    found: ReleaseDetails = request.app.state.server.look(
        lambda core: release_details(
            core, details.record, details.provenance, details.scorecard, comparison, is_withdrawn=is_withdrawn
        )
    )
    return found


@router.get("/events", response_class=StreamingResponse)
async def events(request: Request, _: Viewer) -> StreamingResponse:
    """Live updates as server-sent events: `all` and `devices` (rows of devices), `fleet` (as `GET /fleet`)."""
    feed = request.app.state.feed
    if feed.is_full:
        raise TooManyError("too many pages listen", retry_after_s=30)
    return StreamingResponse(
        feed.listen(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
