"""Names in the path of a request, as the protocol allows them."""

from typing import Annotated

from fastapi import Path

from protocol.ids import NAME_PATTERN, VERSION_PATTERN

FamilyName = Annotated[str, Path(pattern=f"^{NAME_PATTERN}$")]
VersionName = Annotated[str, Path(pattern=f"^{VERSION_PATTERN}$")]
DeviceName = Annotated[str, Path(pattern=f"^{NAME_PATTERN}$")]
RolloutName = Annotated[str, Path(pattern="^r[0-9]{1,9}$")]
