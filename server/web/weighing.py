"""Routes that compare: tiers with what fits them, versions of a family side by side."""

from collections import Counter, defaultdict
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Query, Request

from protocol.ids import VERSION_PATTERN
from server.coordinator import Coordinator
from server.overview import TierOverview, TierRelease, comparable_versions, tiers_overview
from server.tradeoffs.records import DEFAULT_AXES, Axis
from server.tradeoffs.weighing import VERSIONS_MAX, Question, weigh
from server.web.access import Viewer
from server.web.names import FamilyName
from server.web.problems import RESPONSES, NotFoundError
from server.web.views import VersionCount
from server.web.weighing_views import TierReleaseView, Tiers, TierView, Tradeoffs

RUNNING_MAX: Final = 20

router = APIRouter(prefix="/api/v1", responses=RESPONSES)
_Version = Annotated[str, Query(pattern=f"^{VERSION_PATTERN}$", max_length=64)]
_Census = dict[str, Counter[tuple[str, str]]]


@router.get("/tiers")
def tiers(request: Request, _: Viewer) -> Tiers:
    """Kinds of devices: what they have, how many there are, what they run, and which releases fit them."""
    server = request.app.state.server
    census: _Census = server.look(_count)
    found = tiers_overview(server.config.folder)
    names = {each.name for each in found}
    return Tiers(
        tiers=[_tier(each, census.get(each.name, Counter())) for each in found],
        strays={name: counted.total() for name, counted in sorted(census.items()) if name not in names},
    )


@router.get("/tradeoffs/{family}")
def tradeoffs(
    request: Request,
    family: FamilyName,
    _: Viewer,
    version: Annotated[list[_Version], Query(max_length=VERSIONS_MAX)] = [],  # noqa: B006 - FastAPI copies it
    reference: Annotated[str, Query(pattern=f"^({VERSION_PATTERN})?$", max_length=64)] = "",
    axis: Annotated[list[Axis], Query(max_length=len(DEFAULT_AXES) + 2)] = [],  # noqa: B006 - likewise
) -> Tradeoffs:
    """Versions side by side on each tier; those of the family that were not withdrawn, if none are named."""
    folder = request.app.state.server.config.folder
    versions = version or comparable_versions(folder, family)
    if not versions:
        raise NotFoundError(f"there is no family {family}")
    axes = tuple(dict.fromkeys(axis)) or DEFAULT_AXES
    report = weigh(folder, Question(family=family, versions=tuple(versions), reference=reference, axes=axes))
    return Tradeoffs.model_validate({**msgspec.to_builtins(report), "paragraph": report.paragraph_text})


def _count(coordinator: Coordinator) -> _Census:
    """Devices by tier, family and version."""
    census: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for device in coordinator.registry:
        if device.report is not None:
            census[device.tier][device.family, device.version] += 1
    return census


def _tier(each: TierOverview, counted: Counter[tuple[str, str]]) -> TierView:
    tier = each.tier
    return TierView(
        name=each.name,
        runtime=tier.runtime,
        memory_mb=tier.memory_mb,
        disk_mb=tier.disk_mb,
        memory_gb_per_s=tier.memory_gb_per_s,
        token_ms_max=tier.token_ms_max,
        context_tokens=tier.context_tokens,
        stop_first=tier.stop_first,
        measured=len(tier.measured),
        devices=counted.total(),
        running=[
            VersionCount(family=family, version=version, devices=count)
            for (family, version), count in counted.most_common(RUNNING_MAX)
        ],
        releases=[_release(each.name, release) for release in each.releases],
    )


def _release(tier: str, each: TierRelease) -> TierReleaseView:
    named = each.release.resources.tiers
    return TierReleaseView(
        family=each.release.family,
        version=each.release.version,
        state=each.state,
        fits=each.fit.is_good,
        is_for=not named or tier in named,
        model_bytes=each.fit.model_bytes,
        swap_bytes=each.fit.swap_bytes,
        disk_bytes=each.fit.disk_bytes,
        token_ms=each.fit.token_ms,
        source=each.fit.source,
        broken=[broken.detail for broken in each.fit.broken],
        would_fit=each.fit.would_fit,
    )
