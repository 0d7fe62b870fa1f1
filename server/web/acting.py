"""Routes that change something: sign-in, rollouts, releases. Each does what the command of the same name does, by the same call."""

from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response

from server import operations, rollout_orders
from server.accounts import may
from server.actors import acting
from server.audit import Actor
from server.operations import RolloutPlan
from server.rollout_orders import usual_in_flight
from server.rollouts.evidence import Rules
from server.rollouts.waves import parse_waves
from server.web.access import (
    COOKIE,
    Approver,
    Operator,
    Viewer,
    Visit,
    act_of,
    address_of,
    deny,
    new_page_session,
)
from server.web.names import FamilyName, RolloutName, VersionName
from server.web.pictures import release_summary, rollout_summary
from server.web.problems import RESPONSES, SignInError
from server.web.views import (
    NewOrder,
    NewRollout,
    OrderView,
    ReleaseSummary,
    RolloutSummary,
    SignIn,
    Visitor,
)

_CREATED: Final = 201
_NO_CONTENT: Final = 204

router = APIRouter(prefix="/api/v1", responses=RESPONSES)


@router.post("/session")
def sign_in(request: Request, response: Response, form: SignIn) -> Visitor:
    """Sign in; the answer sets the cookie."""
    state = request.app.state
    found = state.store.user(form.user)
    by = Actor(kind="page", name="" if found is None else found.name, address=address_of(request))
    try:
        user = state.doors.check(found, form.user, form.password)
    except SignInError as error:
        # What was typed for a name that nobody has may be a password.
        on = "no such user" if found is None else found.name
        state.store.save(
            [act_of(request, by, "session.refuse", on, "the password is wrong", outcome=error.code)]
        )
        raise
    now_ms = state.clock.now_ms()
    token, session = new_page_session(user, now_ms)
    act = act_of(request, Visit(user, session, by.address).actor, "session.begin", user.name)
    state.store.change_accounts(lambda accounts: [*accounts.begin(session, now_ms), act])
    response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=state.is_secure, path="/")
    return Visitor(user=user.name, role=user.role, csrf=session.csrf, fleet=state.server.config.fleet)


@router.delete("/session", status_code=_NO_CONTENT)
def sign_out(request: Request, response: Response, visitor: Viewer) -> None:
    """Sign out."""
    act = act_of(request, visitor.actor, "session.end", visitor.user.name)
    request.app.state.store.change_accounts(
        lambda accounts: [*ended, act] if (ended := accounts.end(visitor.session.digest)) else []
    )
    response.delete_cookie(COOKIE, path="/")


@router.post("/rollouts", status_code=_CREATED)
def start_rollout(request: Request, wanted: NewRollout, visitor: Operator) -> RolloutSummary:
    """Start a rollout."""
    folder: Path = request.app.state.server.config.folder
    plan = RolloutPlan(
        waves=parse_waves(wanted.waves, [1000 * soak for soak in wanted.soak_s]),
        rules=Rules(acceptable=wanted.acceptable, unacceptable=wanted.unacceptable),
        in_flight_max=wanted.in_flight_max or usual_in_flight(folder, wanted.family),
        pace_per_minute=wanted.pace_per_minute,
        from_version=wanted.from_version,
        by=visitor.user.name,
    )
    with acting(visitor.actor):
        record = operations.start_rollout(
            folder,
            wanted.family,
            wanted.version,
            wave_timeout_ms=wanted.wave_timeout_s * 1000,
            failures_max=wanted.failures_max,
            plan=plan,
        )
    return rollout_summary(record, {})


@router.post("/rollouts/{rollout}/orders", status_code=_CREATED)
def order_rollout(request: Request, rollout: RolloutName, wanted: NewOrder, visitor: Operator) -> OrderView:
    """Pause, resume, promote (an approver's) or abort a rollout. Of two who act at once, the second one is told what the first did."""
    if wanted.action == "promote" and not may(visitor.user.role, "approver"):
        deny(request, visitor, f"{visitor.user.name} is {visitor.user.role}, to promote needs approver")
    folder = request.app.state.server.config.folder
    with acting(visitor.actor):
        order = rollout_orders.order_rollout(
            folder, rollout, wanted.action, by=visitor.user.name, reason=wanted.reason, seen=wanted.seen
        ).order
    return OrderView(
        rollout=order.rollout, number=order.number, action=order.action, by=order.by, at_ms=order.at_ms
    )


@router.post("/releases/{family}/{version}/publish")
def publish_release(
    request: Request, family: FamilyName, version: VersionName, visitor: Approver
) -> ReleaseSummary:
    """Sign a draft with the keys that are on the server; stays a draft where people have to sign as well."""
    server = request.app.state.server
    with acting(visitor.actor):
        record = operations.publish_release(server.config.folder, family, version)
    found: ReleaseSummary = server.look(lambda core: release_summary(core, record, is_withdrawn=False))
    return found


@router.post("/releases/{family}/{version}/withdraw")
def withdraw_release(
    request: Request, family: FamilyName, version: VersionName, visitor: Approver
) -> ReleaseSummary:
    """Take a release out of the signed metadata."""
    server = request.app.state.server
    with acting(visitor.actor):
        waiting = operations.withdraw_release(server.config.folder, family, version)
    record = operations.show_release(server.config.folder, family, version).record
    found: ReleaseSummary = server.look(lambda core: release_summary(core, record, is_withdrawn=not waiting))
    return found
