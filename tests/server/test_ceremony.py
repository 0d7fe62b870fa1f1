"""Keys of several people, one at a time, over the real folder, the real publisher and the real verification of devices."""

import json
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from msgspec.structs import replace

from protocol.errors import MissingKeyError, RequestError, RollbackAttackError, TrustError
from protocol.trust import Floors, Verified, verify
from server import operations
from server.adapters.keys import PASSPHRASE_VARIABLE
from server.cli import main
from server.config import read_config
from server.home import opened
from server.ports import Repository
from server.releases.chain import explain
from server.releases.signers import make_key, public_key_of, remote_signer, signer_of
from server.runtime import Server
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import wait_until

SECRET = "correct horse battery"
Run = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server with one published version, keys of five people beside it, and their passphrase in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHIMBREL_DIR", "fleet")
    operations.init_repository(Path("fleet"))
    add_release("v1", 1)
    operations.publish_release(Path("fleet"), "digits", "v1")
    Path("secret").write_text(SECRET + "\n")
    for name in ("ana", "ben", "cem", "dora", "builder", "approver"):
        make(name)
    return Path("fleet")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its JSON, or with another code what it said."""

    def command(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == code
        captured = capsys.readouterr()
        return captured.err if code else json.loads(captured.out)

    return command


def make(name: str, secret: str | None = SECRET) -> None:
    private, public = make_key(secret)
    Path(f"{name}.pem").write_bytes(private)
    Path(f"{name}.pub").write_bytes(public)


def add_release(version: str, seed: int) -> Path:
    model = write_classifier(Path(f"{version}.onnx"), seed, hidden=40)
    health = write_health_plan(Path("health.json"))
    operations.add_release(Path("fleet"), "digits", version, [model], runtime="onnx", health=health)
    return model


def sign(run: Run, *names: str) -> Any:
    for name in names:
        result = run("keys", "sign", "--key", f"{name}.pem", "--passphrase-file", "secret")
    return result


def to_thresholds(run: Run) -> None:
    """The ceremony of docs/keys.md."""
    run("keys", "assign", "root", "ana.pub", "ben.pub", "cem.pub", "--threshold", "2")
    run("keys", "assign", "targets", "ana.pub", "ben.pub", "cem.pub", "--threshold", "2")
    run("keys", "assign", "releases.digits", "builder.pub", "approver.pub")
    assert sign(run, "ana", "ben", "builder", "approver")["is_published"]


def repository(home: Path) -> Repository:
    with opened(home) as server:
        found = server.store.repository()
    assert found is not None
    return found


class Device:
    """What a device keeps."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = repository(home).roots[0]
        self.floors = Floors()

    def refresh(self) -> Verified:
        signed = repository(self.home)
        documents = replace(signed.documents, roots=signed.roots[self.floors.root :])
        with opened(self.home) as server:
            now_ms = server.clock.now_ms()
        verified = verify(self.root, documents, self.floors, now_ms, ("releases.digits", "artifacts"))
        self.root, self.floors = verified.root, verified.floors
        return verified

    def versions(self) -> set[str]:
        paths = self.refresh().targets
        return {path.split("/")[2].removesuffix(".json") for path in paths if path.startswith("releases/")}


def signatures(document: bytes) -> int:
    return len(json.loads(document)["signatures"])


# --- from one key to thresholds


def test_nothing_changes_for_devices_before_the_last_person_has_signed(home: Path, run: Run) -> None:
    device = Device(home)
    before = repository(home)
    run("keys", "assign", "root", "ana.pub", "ben.pub", "cem.pub", "--threshold", "2")
    result = run("keys", "assign", "targets", "ana.pub", "ben.pub", "cem.pub", "--threshold", "2")
    assert {each["role"]: each["missing"] for each in result["waiting"]} == {"root": 2, "targets": 2}
    assert not sign(run, "ana")["is_published"]
    assert repository(home) == before
    assert sign(run, "cem")["is_published"]
    assert device.versions() == {"v1"}
    assert device.floors.root == 2
    assert not (home / "pending/root.json").exists()


def test_a_release_waits_for_its_approver(home: Path, run: Run) -> None:
    to_thresholds(run)
    device = Device(home)
    add_release("v2", 2)
    assert run("release", "publish", "digits", "v2")["published_ms"] is None
    assert not sign(run, "builder")["is_published"]
    assert device.versions() == {"v1"}
    assert "not published" in run("rollout", "start", "digits", "v2", code=1)
    assert sign(run, "approver")["is_published"]
    assert device.versions() == {"v1", "v2"}
    assert run("release", "list")[1]["published_ms"] > 0
    assert run("rollout", "start", "digits", "v2")["id"] == "r1"
    run("release", "export", "digits", "v2", "-o", "factory")
    assert Path("factory/root.json").read_bytes() == repository(home).roots[-1] != repository(home).roots[0]


def test_a_builder_key_on_the_server_signs_without_being_asked(home: Path, run: Run) -> None:
    to_thresholds(run)
    add_release("v2", 2)
    run("release", "publish", "digits", "v2")
    make("machine", None)
    run("keys", "rotate", "builder", "machine.pub")
    assert sign(run, "ana", "ben")["waiting"][0]["role"] == "targets"
    Path("machine.pem").rename(home / "keys/machine.pem")
    run("release", "publish", "digits", "v2")
    assert sign(run, "approver")["is_published"]
    assert Device(home).versions() == {"v1", "v2"}


def test_several_changes_before_a_signature_are_one_version(home: Path, run: Run) -> None:
    run("keys", "assign", "root", "ana.pub", "ben.pub", "--threshold", "2")
    sign(run, "ana")
    run(
        "keys", "assign", "root", "ana.pub", "ben.pub", "cem.pub", "--threshold", "2"
    )  # her signature is void
    assert sign(run, "ben")["waiting"][0]["missing"] == 1
    assert sign(run, "cem")["is_published"]
    assert len(repository(home).roots) == 2


def test_documents_are_signed_far_from_the_server_and_carried_back(
    home: Path, run: Run, tmp_path: Path
) -> None:
    to_thresholds(run)
    add_release("v2", 2)
    run("release", "publish", "digits", "v2")
    away = tmp_path / "stick"
    away.mkdir()
    waiting = home / "pending/releases.digits.json"
    (away / waiting.name).write_bytes(waiting.read_bytes())
    for name in ("builder", "approver"):
        run("keys", "sign", str(away / waiting.name), "--key", f"{name}.pem", "--passphrase-file", "secret")
    assert run("keys", "list")["pending"][0]["standing"]["missing"] == 2
    waiting.write_bytes((away / waiting.name).read_bytes())
    assert run("keys", "publish")["is_published"]
    assert Device(home).versions() == {"v1", "v2"}


@pytest.mark.usefixtures("home")
def test_what_waits_can_be_given_up(run: Run) -> None:
    run("keys", "assign", "root", "ana.pub", "ben.pub")
    assert run("keys", "drop")["dropped"] == ["root"]
    assert run("keys", "list")["pending"] == []
    assert run("keys", "drop")["dropped"] == []
    assert "nothing waits" in run("keys", "publish", code=1)
    assert "nothing waits" in run("keys", "sign", "--key", "ana.pem", "--passphrase-file", "secret", code=1)


@pytest.mark.usefixtures("home")
def test_a_signer_sees_what_would_change(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    to_thresholds(run)
    add_release("v2", 2)
    run("release", "publish", "digits", "v2")
    run("keys", "rotate", "cem", "dora.pub")
    main(["keys", "sign", "--key", "ana.pem", "--passphrase-file", "secret"])
    shown = capsys.readouterr().out
    assert "lists releases/digits/v2.json" in shown
    assert "root: 2 of 3: ana" in shown
    assert "was 2 of 3" in shown
    assert "ana signed root" in shown  # targets itself says the same, and two of its new keys have signed it


def test_the_server_goes_on_alone_with_artifacts_and_leaves_what_people_signed(home: Path, run: Run) -> None:
    to_thresholds(run)
    device = Device(home)
    device.refresh()
    targets, family = (home / "metadata" / name for name in ("targets.json", "releases.digits.json"))
    before = targets.read_bytes(), family.read_bytes()
    with Server(replace(read_config(home), port=0), seed=1) as server:
        server.wait_connected(10)
        signed = server._signed(
            (), tuple(path for path in device.refresh().targets if path.startswith("files/"))
        )
    assert (targets.read_bytes(), family.read_bytes()) == before
    assert dict(signed.documents.delegated)["artifacts"] != b""
    assert device.versions() == {"v1"}


# --- rotation, loss, theft


def test_17_a_lost_root_key_is_replaced_by_the_two_that_are_left(home: Path, run: Run) -> None:
    device, late = Device(home), Device(home)
    to_thresholds(run)
    device.refresh()
    run("keys", "rotate", "cem", "dora.pub")
    result = sign(run, "ana", "ben")
    assert result["is_published"]
    names = [key["key"]["name"] for key in run("keys", "list")["roles"][0]["keys"]]
    assert names == ["ana", "ben", "dora"]
    assert device.versions() == late.versions() == {"v1"}
    assert device.floors.root == late.floors.root == 3
    run("keys", "renew", "root")
    assert "nothing waits" in run("keys", "sign", "--key", "cem.pem", "--passphrase-file", "secret", code=1)


def test_15_after_the_theft_of_every_online_key_two_people_bring_the_fleet_back(home: Path, run: Run) -> None:
    """The steps of docs/keys.md, "somebody was on the server"."""
    to_thresholds(run)
    device = Device(home)
    device.refresh()
    device.floors = replace(device.floors, timestamp=(1 << 63) - 1, snapshot=(1 << 63) - 1, time_ms=1 << 42)
    with pytest.raises(TrustError):
        device.refresh()
    names = ("timestamp", "snapshot", "artifacts", "director")
    for name in names:
        (home / f"keys/{name}.pem").rename(f"stolen-{name}.pem")
        run("keys", "make", f"{name}-2", "-o", "fleet/keys", "--no-passphrase")
        run("keys", "rotate", name, f"fleet/keys/{name}-2.pub")
    assert sign(run, "ana", "cem")["is_published"]
    assert device.versions() == {"v1"}
    assert device.floors.timestamp < 100
    listed = {role["role"]: role["keys"][0] for role in run("keys", "list")["roles"] if role["role"] in names}
    assert {each["key"]["name"] for each in listed.values()} == {f"{name}-2" for name in names}
    assert all(each["is_here"] for each in listed.values())


def test_a_running_server_signs_with_the_new_keys(home: Path, run: Run) -> None:
    with Server(replace(read_config(home), port=0), seed=1) as server:
        server.wait_connected(10)
        run("keys", "make", "timestamp-2", "-o", "fleet/keys", "--no-passphrase")
        assert run("keys", "rotate", "timestamp", "fleet/keys/timestamp-2.pub")["is_published"]
        (home / "keys/timestamp.pem").unlink()
        assert wait_until(lambda: len(server._repository.roots) == 2 and not server._has_unread_keys)
        signed = server._signed((), ("files/none",))
        assert signatures(signed.documents.timestamp) == 1
    assert Device(home).versions() == {"v1"}


def test_8_a_server_says_which_documents_people_have_to_sign_before_devices_stop_believing_them(
    home: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    to_thresholds(run)
    (home / "keys/releases.pem").unlink()

    class Later:
        def now_ms(self) -> int:
            return int(time.time() * 1000) + 65 * 86_400_000  # documents of families live for 90 days

    with Server(replace(read_config(home), port=0), clock=Later(), seed=1) as server:
        server.wait_connected(10)
    assert re.search(r"the document of role releases.digits ends in 2\d days: run", caplog.text)
    assert "role root" not in caplog.text


def test_a_rotation_whose_new_key_is_not_here_changes_nothing(home: Path, run: Run) -> None:
    before = repository(home)
    assert "role timestamp is missing" in run("keys", "rotate", "timestamp", "ana.pub", code=1)
    assert repository(home) == before


def test_a_version_that_was_withdrawn_stays_so_for_devices_that_saw_it_go(home: Path, run: Run) -> None:
    device = Device(home)
    device.refresh()
    old = repository(home)
    add_release("v2", 2)
    run("release", "publish", "digits", "v2")
    device.refresh()
    documents = replace(old.documents, roots=())
    with opened(home) as server, pytest.raises(RollbackAttackError):
        verify(device.root, documents, device.floors, server.clock.now_ms())


def test_a_release_is_withdrawn_by_those_who_sign_for_it(home: Path, run: Run) -> None:
    to_thresholds(run)
    device = Device(home)
    add_release("v2", 2)
    assert "is not published" in run("release", "withdraw", "digits", "v2", code=1)
    run("release", "publish", "digits", "v2")
    sign(run, "builder", "approver")
    assert device.versions() == {"v1", "v2"}
    assert run("release", "withdraw", "digits", "v2")["waiting"][0]["role"] == "releases.digits"
    assert device.versions() == {"v1", "v2"}
    assert sign(run, "approver", "builder")["is_published"]
    assert device.versions() == {"v1"}
    assert "withdrawn before" in run("release", "withdraw", "digits", "v2", code=1)
    assert "was withdrawn" in run("rollout", "start", "digits", "v2", code=1)
    assert "cannot change" in run("release", "publish", "digits", "v2", code=1)
    assert [each["is_withdrawn"] for each in run("release", "list")] == [False, True]
    assert not Path("fleet/pending/releases.digits.json").exists()


# --- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["assign", "root", "ana.pub", "--threshold", "2"], "threshold of 2 cannot be reached with 1 key"),
        (["assign", "root", "ana.pub", "--threshold", "0"], "threshold of 0"),
        (["assign", "root", "ana.pub", "ana.pub"], "one key is named twice"),
        (["assign", "releases.Digits", "ana.pub"], "releases.Digits"),
        (["assign", "everything", "ana.pub"], "nothing is delegated to a role 'everything'"),
        (["assign", "root", "none.pub"], "none.pub"),
        (["assign", "root", "ana.pem"], "ana holds no public key"),
        (["assign", "director", "ana.pub", "--threshold", "2"], "threshold of 2 cannot be reached"),
        (["revoke", "root"], "role root needs 1 key(s) and would have 0"),
        (["revoke", "nobody"], "no key 'nobody'"),
        (["rotate", "root", "ana.pub", "--role", "snapshot"], "no key 'root' signs for role snapshot"),
        (["rotate", "root", "ana.pub", "--role", "none"], "there is no role 'none'"),
        (["renew", "snapshot"], "the server signs snapshot by itself"),
        (["renew", "releases.letters"], "there is no role 'releases.letters'"),
        (["sign", "--key", "nix.pem"], "nix.pem"),
        (["sign", "--key", "hsm:2"], "give --public"),
        (["sign", "no.json", "--key", "ana.pem", "--passphrase-file", "secret"], "no.json"),
        (["sign", "health.json", "--key", "ana.pem", "--passphrase-file", "secret"], "health.json"),
        (["make", "../x", "--no-passphrase"], "cannot be called '../x'"),
        (["make", "ana", "--no-passphrase"], "ana.pem exists and is never overwritten"),
        (["make", "x", "--passphrase-file", "short"], "at least 12 characters"),
        (["make", "x", "--passphrase-file", "empty"], "its first line is empty"),
        (["show", "health.json"], "holds no public key"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(home: Path, run: Run, words: list[str], said: str) -> None:
    Path("short").write_text("eleven_char\n")
    Path("empty").write_text("\n")
    before = repository(home)
    error = run("keys", *words, code=1)
    assert said in error
    assert error.count("\n") == 1
    assert repository(home) == before
    assert run("keys", "list")["pending"] == []


@pytest.mark.usefixtures("home")
def test_revoking_a_key_keeps_the_threshold(run: Run) -> None:
    to_thresholds(run)
    run("keys", "revoke", "cem")
    assert sign(run, "ana", "ben")["is_published"]
    assert [len(role["keys"]) for role in run("keys", "list")["roles"][:2]] == [2, 2]
    assert "needs 2 key(s) and would have 1" in run("keys", "revoke", "ben", code=1)


@pytest.mark.usefixtures("home")
def test_two_keys_of_one_name_are_told_apart_by_their_ids(run: Run) -> None:
    first = Path("ana.pub").read_bytes()
    make("ana")
    Path("old").mkdir()
    Path("old/ana.pub").write_bytes(first)
    run("keys", "assign", "root", "ana.pub", "old/ana.pub")
    error = run("keys", "revoke", "ana", code=1)
    assert "2 keys are called 'ana'" in error
    keyid = public_key_of("ana", first).keyid
    assert keyid in error
    assert run("keys", "rotate", keyid[:10], "ben.pub")["waiting"][0]["missing"] == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"signed": {}, "signatures": []}', b"x" * 40_000])
def test_a_waiting_document_that_was_damaged_is_named(home: Path, run: Run, content: bytes) -> None:
    run("keys", "assign", "root", "ana.pub", "ben.pub")
    (home / "pending/root.json").write_bytes(content)
    for words in (["list"], ["publish"], ["sign", "--key", "ana.pem", "--passphrase-file", "secret"]):
        assert "pending/root.json" in run("keys", *words, code=1)
    assert run("keys", "drop")["dropped"] == ["root"]


def test_a_document_of_no_role_is_named(home: Path, run: Run) -> None:
    run("keys", "assign", "root", "ana.pub", "ben.pub")
    (home / "pending/releases.other.json").write_bytes((home / "metadata/releases.digits.json").read_bytes())
    assert "releases.other.json is the document of no role" in run("keys", "list", code=1)


def test_a_document_that_was_signed_for_another_version_is_refused_with_advice(home: Path, run: Run) -> None:
    to_thresholds(run)
    add_release("v2", 2)
    run("release", "publish", "digits", "v2")
    waiting = home / "pending/releases.digits.json"
    old = waiting.read_bytes()
    run("keys", "drop")
    for version in ("v3", "v4"):
        add_release(version, 3)
        run("release", "publish", "digits", version)
        sign(run, "builder", "approver")
    waiting.write_bytes(old)
    run("keys", "sign", "--key", "builder.pem", "--passphrase-file", "secret")
    words = ("keys", "sign", "--key", "approver.pem", "--passphrase-file", "secret")
    assert "releases.digits version 3 waits for signatures, but 4 is published" in run(*words, code=1)
    run("keys", "drop")
    assert Device(home).versions() == {"v1", "v3", "v4"}


# --- keys


@pytest.mark.usefixtures("home")
def test_private_keys_are_encrypted_and_for_their_owner_only(run: Run) -> None:
    made = run("keys", "make", "fay", "--passphrase-file", "secret")
    pem = Path("fay.pem").read_bytes()
    assert b"ENCRYPTED PRIVATE KEY" in pem
    assert stat.S_IMODE(Path("fay.pem").stat().st_mode) == 0o600
    assert run("keys", "show", "fay.pub")["keyid"] == made["keyid"]
    assert signer_of("fay", pem, SECRET).public_key.keyid == made["keyid"]


@pytest.mark.usefixtures("home")
def test_a_wrong_or_missing_passphrase_is_told_without_showing_it(run: Run) -> None:
    run("keys", "assign", "root", "ana.pub", "ben.pub")
    Path("wrong").write_text("incorrect horse\n")
    error = run("keys", "sign", "--key", "ana.pem", "--passphrase-file", "wrong", code=1)
    assert "passphrase does not fit" in error
    assert "incorrect" not in error
    assert "nobody can be asked" in run("keys", "sign", "--key", "ana.pem", code=1)


def test_an_encrypted_key_in_the_folder_signs_only_where_its_passphrase_is_at_hand(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("timestamp-2")
    for suffix in (".pem", ".pub"):
        Path(f"timestamp-2{suffix}").rename(home / f"keys/timestamp-2{suffix}")
    rotate = ("keys", "rotate", "timestamp", "fleet/keys/timestamp-2.pub")
    assert "role timestamp is missing" in run(*rotate, code=1)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "secret")
    assert run(*rotate)["is_published"]
    Path("secret").write_text("another passphrase\n")
    assert "passphrase does not fit" in run("keys", "list", code=1)


def test_a_key_that_is_reached_by_its_uri_signs_in_the_folder_and_by_hand(home: Path, run: Run) -> None:
    """`file2:` is the one URI that needs no device; tokens and key services are opened by the same call."""
    make("online", None)
    place = Path("online.pem").resolve()
    Path("online.pub").rename(home / "keys/online.pub")
    (home / "keys/online.uri").write_text(f"file2:{place}\n")
    assert run("keys", "rotate", "snapshot", "fleet/keys/online.pub")["is_published"]
    make("hand", None)
    run("keys", "assign", "root", "hand.pub", "ana.pub")
    run("keys", "sign", "--key", f"file2:{Path('hand.pem').resolve()}", "--public", "hand.pub")
    assert sign(run, "ana")["is_published"]
    assert Device(home).versions() == {"v1"}


def test_a_signer_that_cannot_be_reached_is_an_error_and_no_crash() -> None:
    key = public_key_of("x", make_key(None)[1])
    for uri in ("hsm:2?label=x", "awskms:none", "gcpkms:none", "file2:/nowhere", "nonsense:", ""):
        with pytest.raises(MissingKeyError):
            remote_signer(uri, key, lambda _: "1234")


@pytest.mark.parametrize(
    "pem", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"\xff" * 100]
)
def test_files_that_are_no_keys_are_refused(pem: bytes) -> None:
    with pytest.raises(MissingKeyError):
        signer_of("x", pem)
    with pytest.raises(MissingKeyError):
        public_key_of("x", pem)


def test_keys_that_cannot_sign_are_refused() -> None:
    private = X25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(MissingKeyError, match="no Ed25519, ECDSA or RSA key"):
        signer_of("x", pem)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(MissingKeyError):
        public_key_of("x", public)


def test_a_key_made_by_openssl_would_do_as_well() -> None:
    """`openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write what is read here."""
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert signer_of("x", pem).public_key.keyid == public_key_of("x", public).keyid


# --- the whole chain


def test_verify_shows_the_chain_of_a_file_and_says_whether_it_may_run(home: Path, run: Run) -> None:
    assert run("verify", "v1.onnx")["may_run"]
    to_thresholds(run)
    chain = run("verify", "v1.onnx")
    assert chain["may_run"]
    assert [listing["role"] for listing in chain["listings"]] == ["releases.digits", "artifacts"]
    family, *_ = chain["steps"]
    assert {key["name"] for key in family["standing"]["signed"]} == {"builder", "approver"}
    assert [root["version"] for root in chain["roots"]] == [1, 2]
    assert all(not step["standing"]["missing"] for step in chain["steps"])
    add_release("v2", 2)
    assert main(["verify", "v2.onnx", "--json"]) == 1
    assert main(["verify", "health.json"]) == 1
    assert run("verify", "v1.onnx", "--root", str(home / "metadata/2.root.json"))["start"] == 2


@pytest.mark.usefixtures("home")
def test_verify_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "v1.onnx"]) == 0
    shown = capsys.readouterr().out
    assert "v1.onnx of digits v1: releases/digits/v1.json, listed by releases.digits" in shown
    assert shown.rstrip().endswith("A device that starts from root 1 runs this file.")
    Path("other.onnx").write_bytes(b"other")
    assert main(["verify", "other.onnx"]) == 1
    assert "does not run this file: no signed release names this file." in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_verify_refuses_a_root_of_another_fleet(run: Run) -> None:
    other = operations.init_repository(Path("other"))
    assert "none of this repository" in run("verify", "v1.onnx", "--root", str(other), code=1)
    assert "v9.onnx" in run("verify", "v9.onnx", code=1)


def test_verify_says_when_a_family_has_expired(home: Path) -> None:
    class Later:
        def now_ms(self) -> int:
            return 1 << 42

    with opened(home, clock=Later()) as server:
        signed = repository(home)
        record = server.store.releases()[0]
        digest = record.release.files[0].sha256
        chain = explain(signed, [record], digest, 1, server.clock.now_ms())  # type: ignore[arg-type]
    assert not chain.may_run
    assert "expired" in chain.refusal


def test_a_change_while_a_release_is_refused_names_its_family(home: Path, run: Run) -> None:
    (home / "keys/releases.pem").unlink()
    add_release("v2", 2)
    waiting = run("release", "publish", "digits", "v2")
    assert waiting["published_ms"] is None
    write_classifier(Path("l.onnx"), 3, hidden=40)
    operations.add_release(
        home, "letters", "v1", [Path("l.onnx")], runtime="onnx", health=Path("health.json")
    )
    assert "keys assign releases.letters" in run("release", "publish", "letters", "v1", code=1)
    with pytest.raises(RequestError):
        operations.publish_release(home, "letters", "v1")
