"""Routes that change something: sign-in, rollouts, releases. Each does what the command of the same name does, by the same call."""

from typing import Final

from fastapi import APIRouter, Request, Response

from server import operations
from server.web.access import COOKIE, Approver, Operator, Viewer, new_page_session
from server.web.names import FamilyName, VersionName
from server.web.pictures import release_summary, rollout_summary
from server.web.problems import RESPONSES
from server.web.views import ReleaseSummary, RolloutOrder, RolloutSummary, SignIn, Visitor

_NO_CONTENT: Final = 204

router = APIRouter(prefix="/api/v1", responses=RESPONSES)


@router.post("/session")
def sign_in(request: Request, response: Response, form: SignIn) -> Visitor:
    """Sign in; the answer sets the cookie."""
    state = request.app.state
    user = state.doors.check(state.store.accounts().users.get(form.user), form.user, form.password)
    now_ms = state.clock.now_ms()
    token, session = new_page_session(user, now_ms)
    state.store.change_accounts(lambda accounts: accounts.begin(session, now_ms))
    response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=state.is_secure, path="/")
    return Visitor(user=user.name, role=user.role, csrf=session.csrf, fleet=state.server.config.fleet)


@router.delete("/session", status_code=_NO_CONTENT)
def sign_out(request: Request, response: Response, visitor: Viewer) -> None:
    """Sign out."""
    request.app.state.store.change_accounts(lambda accounts: accounts.end(visitor.session.digest))
    response.delete_cookie(COOKIE, path="/")


@router.post("/rollouts", status_code=201)
def start_rollout(request: Request, order: RolloutOrder, _: Operator) -> RolloutSummary:
    """Start a rollout."""
    record = operations.start_rollout(
        request.app.state.server.config.folder,
        order.family,
        order.version,
        canary_count=order.canary_count,
        wave_timeout_ms=order.wave_timeout_s * 1000,
        failures_max=order.failures_max,
    )
    return rollout_summary(record, {})


@router.post("/releases/{family}/{version}/publish")
def publish_release(
    request: Request, family: FamilyName, version: VersionName, _: Approver
) -> ReleaseSummary:
    """Sign a draft with the keys that are on the server; stays a draft where people have to sign as well."""
    server = request.app.state.server
    record = operations.publish_release(server.config.folder, family, version)
    found: ReleaseSummary = server.look(lambda core: release_summary(core, record))
    return found


@router.post("/releases/{family}/{version}/withdraw")
def withdraw_release(
    request: Request, family: FamilyName, version: VersionName, _: Approver
) -> ReleaseSummary:
    """Take a release out of the signed metadata."""
    server = request.app.state.server
    operations.withdraw_release(server.config.folder, family, version)
    record = operations.show_release(server.config.folder, family, version).record
    found: ReleaseSummary = server.look(lambda core: release_summary(core, record))
    return found
