"""The HTTP API does what its OpenAPI description says, whatever it is asked: schemathesis."""

import subprocess
import sys
from pathlib import Path

from server.accounts import SessionRecord
from server.adapters.secrets import new_token, token_digest
from server.home import opened
from tests.browser.lab import BrowserLab


def test_schemathesis_finds_nothing(lab: BrowserLab, tmp_path: Path) -> None:
    token = new_token()
    with opened(lab.home) as home:
        now_ms = home.clock.now_ms()
        session = SessionRecord(
            digest=token_digest(token),
            user="approver",
            kind="token",
            created_ms=now_ms,
            expires_ms=now_ms + 3_600_000,
        )
        home.store.change_accounts(lambda accounts: accounts.begin(session, now_ms))
    # Once with whatever comes, once with names that exist.
    known = tmp_path / "known.toml"
    known.write_text(
        '[parameters]\nfamily = "digits"\nversion = "v1"\ndevice = "device-000"\nrollout = "r1"\n'
    )
    for options in ([], ["--config-file", str(known)]):
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), *options, "run", f"{lab.url}/api/openapi.json",
                "--header", f"Authorization: Bearer {token}", "--exclude-path", "/api/v1/events",
                "--max-examples", "25", "--seed", "1", "--no-color",
            ],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
