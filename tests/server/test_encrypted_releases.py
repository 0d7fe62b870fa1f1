"""Encrypted releases on the server: what is signed and stored, who gets keys, and what operators are told."""

import json
import queue
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from protocol.constants import CHUNK_BYTES
from protocol.encryption import ContentCipher, content_key_name, unwrap_key
from protocol.errors import MissingKeyError, RequestError
from protocol.identity import PrivateKey, key_digest, make_key
from protocol.ids import DeviceId, Digest, FleetId, digest_of
from protocol.messages import Desired, KeyAnswer, KeyRequest, Report
from protocol.release import DeltaName, delta_target, file_target
from protocol.trust import Target
from server import operations
from server.adapters.vault import VAULT_KEY_FILE, Vault
from server.cli import main
from server.content_keys import ContentKeys
from server.coordinator import Coordinator
from server.effects import AnswerKeys
from server.events import DeltaBuilt, Event, RequestReceived, Started
from server.fleet.registry import DeviceRecord
from server.home import KEYS_FOLDER, Home, opened
from server.identity import authority_of, ensure_authority, issuer, revoke_name
from server.ports import ContentKeyRecord, ReleaseRecord
from server.releases.builders import BuildPool
from server.releases.catalog import Catalog
from tests.server.samples import NOW_MS, write_health, write_model

DEVICE, FLEET = DeviceId("pi-1"), FleetId("lab")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "server"
    operations.init_repository(folder, "lab")
    return folder


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "server")


def add(
    home: Path, version: str, seed: int, is_encrypted: bool | None = None, family: str = "digits"
) -> ReleaseRecord:
    """Add and publish."""
    model = write_model(home.parent / "model.onnx", seed)
    health = write_health(home.parent / "health.json")
    operations.add_release(
        home, family, version, [model], runtime="onnx", health=health, is_encrypted=is_encrypted
    )
    return operations.publish_release(home, family, version)


def file_of(record: ReleaseRecord) -> Digest:
    return Digest(record.release.files[0].sha256)


def targets_of(home: Home) -> dict[str, Target]:
    repository = home.store.repository()
    assert repository is not None
    return home.publisher().checked(repository, home.clock.now_ms()).targets


def certify(home: Path, device: DeviceId = DEVICE) -> PrivateKey:
    """Give a device a certificate, without its having asked."""
    key = make_key()
    with opened(home) as server:
        ensure_authority(server)
        now_ms = server.clock.now_ms()
        record = issuer(authority_of(home), now_ms, 90)(device, key.public_key())
        server.store.change_identities(lambda _: [record])
    return key


def report(home: Path, device: DeviceId, family: str = "digits") -> None:
    """Let a device have said what it is."""
    said = Report(device=device, sequence=1, state="idle", family=family, version="0")
    with opened(home) as server:
        server.store.save([DeviceRecord(device=device, report=said, seen_ms=1)])


# --- what is signed and stored ------------------------------------------------------------------------------------


def test_an_encrypted_release_is_signed_as_it_travels_and_stored_so(home: Path) -> None:
    record = add(home, "1", 1, is_encrypted=True)
    digest = file_of(record)
    assert record.is_encrypted
    with opened(home) as server:
        targets = targets_of(server)
        assert file_target(digest) not in targets
        target = targets[file_target(digest, is_encrypted=True)]
        plain = server.blobs.path(digest).read_bytes()
        sent = server.blobs.path(target.digest).read_bytes()
        assert (digest_of(plain), digest_of(sent), len(sent)) == (digest, target.digest, len(plain))
        assert target.length == len(plain)
        blocks = {plain[at : at + 32] for at in range(0, len(plain) - 32, 32)}
        assert not any(sent[at : at + 32] in blocks for at in range(len(sent) - 32))
        # The key is there, under lock, and opens what was signed; every chunk by itself.
        locked = server.store.content_key(target.digest)
        assert locked is not None
        key = Vault(home / KEYS_FOLDER).unlock(target.digest, locked.locked)
        assert target.custom.encryption is not None
        assert content_key_name(key) == target.custom.encryption.key
        chunk = server.blobs.read_chunk(target.digest, 1)
        assert ContentCipher(key)(CHUNK_BYTES, chunk) == plain[CHUNK_BYTES : CHUNK_BYTES + len(chunk)]
        catalog = Catalog.of(targets, [record.release], 0)
        assert catalog.is_secret(digest)
        assert catalog.blob_chunks(digest) is None  # nobody is sent what is not signed
        assert catalog.blob_chunks(target.digest) is not None


def test_a_release_that_is_not_encrypted_is_signed_as_ever(home: Path) -> None:
    record = add(home, "1", 1)
    with opened(home) as server:
        target = targets_of(server)[file_target(file_of(record))]
        assert target.custom.encryption is None
        documents = server.store.repository()
        assert documents is not None
        assert b"encrypt" not in msgspec.json.encode(documents)
    assert not (home / KEYS_FOLDER / VAULT_KEY_FILE).exists()


def test_a_file_of_two_encrypted_releases_is_one_artifact(home: Path) -> None:
    first = add(home, "1", 1, is_encrypted=True)
    with opened(home) as server:
        before = targets_of(server)[file_target(file_of(first), is_encrypted=True)]
    add(home, "2", 1, is_encrypted=True)
    with opened(home) as server:
        assert targets_of(server)[file_target(file_of(first), is_encrypted=True)] == before


def test_the_same_file_is_never_encrypted_with_the_same_key(home: Path) -> None:
    record = add(home, "1", 1, is_encrypted=True)
    with opened(home) as server:
        again = [server.content_keys().encrypt(file_of(record)) for _ in range(2)]
    assert len({each.blob.digest for each in again}) == 2
    assert len({each.encryption.key for each in again}) == 2


def test_a_family_stays_encrypted_until_somebody_says_otherwise(home: Path) -> None:
    assert not add(home, "1", 1).is_encrypted
    assert add(home, "2", 2, is_encrypted=True).is_encrypted
    assert add(home, "3", 3).is_encrypted
    assert not add(home, "1", 9, family="other").is_encrypted
    assert not add(home, "4", 4, is_encrypted=False).is_encrypted


def test_a_secret_file_is_not_published_for_all_to_read(home: Path) -> None:
    add(home, "1", 1, is_encrypted=True)
    with pytest.raises(RequestError, match=r"model\.onnx is encrypted in digits 1.*--encrypt"):
        add(home, "2", 1, is_encrypted=False)
    with pytest.raises(RequestError, match="encrypted in digits 1"):
        add(home, "1", 1, family="other")


def test_a_draft_that_all_could_read_keeps_a_file_from_being_a_secret(home: Path) -> None:
    model, health = write_model(home.parent / "m.onnx", 1), write_health(home.parent / "h.json")
    operations.add_release(home, "digits", "1", [model], runtime="onnx", health=health)
    with pytest.raises(RequestError, match="digits 1 as well, which is not encrypted"):
        operations.add_release(home, "digits", "2", [model], runtime="onnx", health=health, is_encrypted=True)
    # The draft itself may be added again, the other way.
    record = operations.add_release(
        home, "digits", "1", [model], runtime="onnx", health=health, is_encrypted=True
    )
    assert record.is_encrypted


def test_what_all_can_read_already_stays_as_it_is(home: Path) -> None:
    record = add(home, "1", 1)
    add(home, "2", 1, is_encrypted=True)
    with opened(home) as server:
        targets = targets_of(server)
        assert file_target(file_of(record)) in targets
        assert file_target(file_of(record), is_encrypted=True) not in targets
        assert not Catalog.of(targets, [record.release], 0).is_secret(file_of(record))


# --- deltas ---------------------------------------------------------------------------------------------------------


def test_a_delta_from_or_to_a_secret_is_one(home: Path) -> None:
    records = [add(home, "1", 1), add(home, "2", 2, is_encrypted=True), add(home, "3", 3, is_encrypted=False)]
    with opened(home) as server:
        catalog = Catalog.of(targets_of(server), [record.release for record in records], 0)
    coordinator = Coordinator()
    coordinator.handle(Started(catalog, [], [], [], [], [], []), NOW_MS)
    planned = {}
    for base, result in ((0, 1), (1, 2), (0, 2)):
        files = {"model.onnx": records[base].release.files[0].sha256}
        said = Report(device=DEVICE, sequence=1, state="idle", family="digits", version="x", files=files)
        release = records[result].release
        group = coordinator.deltas.graph.group(release, said)
        names = coordinator.deltas.graph.builds(release, {group: 10_000}, lambda _: False)
        assert names
        planned[base, result] = {name.is_encrypted for name in names}
    assert planned == {(0, 1): {True}, (1, 2): {True}, (0, 2): {False}}


def test_a_secret_delta_is_stored_encrypted_and_not_as_it_is(home: Path) -> None:
    records = [add(home, str(seed), seed, is_encrypted=True) for seed in (1, 2)]
    first, second = map(file_of, records)
    name = DeltaName(first, second, is_encrypted=True)
    events: queue.Queue[Event] = queue.Queue()
    with opened(home) as server:
        before = {path for path in (home / "blobs").rglob("*") if path.is_file()}
        pool = BuildPool(home / "blobs", 1, 60, events.put, server.content_keys().encrypt_delta)
        pool.build(name)
        built = events.get(timeout=60)
        pool.stop()
        assert isinstance(built, DeltaBuilt)
        assert built.encryption is not None
        assert server.blobs.describe(built.blob.digest) == built.blob
        after = {path for path in (home / "blobs").rglob("*") if path.is_file()}
        assert {path.name for path in after - before} == {built.blob.digest}
        locked = server.store.content_key(built.blob.digest)
        assert locked is not None
        key = Vault(home / KEYS_FOLDER).unlock(built.blob.digest, locked.locked)
        sent = server.blobs.path(built.blob.digest).read_bytes()
        assert ContentCipher(key)(0, sent).startswith(b"\x89WBD")
    assert built.name == name
    assert delta_target(*name).endswith(".encrypted")


# --- who gets keys --------------------------------------------------------------------------------------------------


def answer(home: Path, blobs: Sequence[Digest], device: DeviceId = DEVICE) -> KeyAnswer:
    """As the running server answers."""
    with opened(home) as server:
        identities, now_ms = server.store.identities(), server.clock.now_ms()
        recipients = [record.public_key for record in identities.valid(device, now_ms)]
        return server.content_keys().answer(FLEET, device, blobs, recipients)


def artifact(home: Path, record: ReleaseRecord) -> Digest:
    with opened(home) as server:
        return targets_of(server)[file_target(file_of(record), is_encrypted=True)].digest


def test_a_device_with_a_certificate_gets_keys_that_it_alone_can_open(home: Path) -> None:
    blob = artifact(home, add(home, "1", 1, is_encrypted=True))
    key = certify(home)
    said = answer(home, [blob])
    assert said.code == ""
    (wrapped,) = said.keys
    assert wrapped.recipient == key_digest(key.public_key())
    content_key = unwrap_key(wrapped.wrapped, key, FLEET, DEVICE, blob)
    with opened(home) as server:
        sent = server.blobs.path(blob).read_bytes()
    assert digest_of(ContentCipher(content_key)(0, sent)) == digest_of(
        (home.parent / "model.onnx").read_bytes()
    )


def test_around_a_renewal_the_keys_come_for_both_certificates(home: Path) -> None:
    blob = artifact(home, add(home, "1", 1, is_encrypted=True))
    keys = [certify(home), certify(home)]
    said = answer(home, [blob])
    assert {each.recipient for each in said.keys} == {key_digest(key.public_key()) for key in keys}


def test_a_device_that_was_revoked_or_never_enrolled_gets_no_key(home: Path) -> None:
    blob = artifact(home, add(home, "1", 1, is_encrypted=True))
    certify(home)
    assert answer(home, [blob], DeviceId("pi-2")).code == "keys.no_certificate"
    revoke_name(home, DEVICE)
    said = answer(home, [blob])
    assert (said.code, said.keys) == ("keys.no_certificate", ())


def asked(home: Path, records: Sequence[ReleaseRecord], version: str, blobs: Sequence[str]) -> AnswerKeys:
    """What the coordinator orders when a device that was asked to run `version` asks for keys."""
    with opened(home) as server:
        catalog = Catalog.of(targets_of(server), [record.release for record in records], 1 << 52)
    desired = Desired(sequence=1, rollout="r1", family="digits", version=version) if version else None
    device = DeviceRecord(device=DEVICE, desired=desired, desired_sequence=1, seen_ms=NOW_MS)
    coordinator = Coordinator()
    coordinator.handle(Started(catalog, [device], [], [], [], [], []), NOW_MS)
    (effect,) = coordinator.handle(RequestReceived(DEVICE, KeyRequest(blobs=tuple(blobs))), NOW_MS)
    assert isinstance(effect, AnswerKeys)
    assert effect.device == DEVICE
    return effect


def test_a_device_gets_keys_of_what_it_was_asked_to_run_and_of_nothing_else(home: Path) -> None:
    records = [add(home, str(seed), seed, is_encrypted=True) for seed in (1, 2)]
    first, second = (artifact(home, record) for record in records)
    assert asked(home, records, "1", [first]).blobs == (first,)
    assert asked(home, records, "1", [second]).blobs == ()
    assert asked(home, records, "1", [first, second]).blobs == ()
    assert asked(home, records, "1", [digest_of(b"what is not signed")]).blobs == ()
    assert asked(home, records, "3", [first]).blobs == ()
    assert asked(home, records, "", [first]).blobs == ()


def test_nobody_is_given_keys_of_nothing(home: Path) -> None:
    add(home, "1", 1, is_encrypted=True)
    certify(home)
    assert answer(home, []).code == "keys.refused"


# --- keys at rest ---------------------------------------------------------------------------------------------------


def test_content_keys_are_locked_in_the_database_and_the_key_to_them_is_the_owners(home: Path) -> None:
    blob = artifact(home, add(home, "1", 1, is_encrypted=True))
    path = home / KEYS_FOLDER / VAULT_KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    vault = bytes.fromhex(path.read_text().strip())
    with opened(home) as server:
        record = server.store.content_key(blob)
        assert record is not None
        key = Vault(home / KEYS_FOLDER).unlock(blob, record.locked)
    for file in home.rglob("*"):
        if file.is_file() and file != path:
            data = file.read_bytes()
            for secret in (key, vault):
                assert secret not in data
                assert secret.hex().encode() not in data


@pytest.mark.parametrize("damage", ["gone", "another", "cut", "text"])
def test_a_vault_that_is_not_what_it_was_gives_a_code_and_no_key(
    home: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    blob = artifact(home, add(home, "1", 1, is_encrypted=True))
    certify(home)
    path = home / KEYS_FOLDER / VAULT_KEY_FILE
    before = path.read_text().strip()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text({"another": "ab" * 32, "cut": before[:-2], "text": "ü" * 64}[damage])
    said = answer(home, [blob])
    assert (said.code, said.keys) == ("keys.unavailable", ())
    assert VAULT_KEY_FILE in caplog.text
    assert before not in caplog.text + said.detail
    if damage != "another":
        # Nor is another one made in its place: that would have to be put back as well.
        with pytest.raises(MissingKeyError, match=VAULT_KEY_FILE):
            add(home, "2", 2)


def test_a_locked_key_opens_for_its_own_artifact_only(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.prepare(may_create=True)
    one, other = digest_of(b"1"), digest_of(b"2")
    locked = vault.lock(one, bytes(32))
    assert vault.unlock(one, locked) == bytes(32)
    assert locked != vault.lock(one, bytes(32))
    for blob, data in ((other, locked), (one, locked[:-1]), (one, b"")):
        with pytest.raises(MissingKeyError):
            vault.unlock(blob, data)


def test_a_key_that_the_database_lost_gives_a_code(home: Path) -> None:
    certify(home)
    assert answer(home, [digest_of(b"never encrypted here")]).code == "keys.unavailable"


def test_what_was_logged_of_a_device_is_logged_once(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(home) as server:
        keys = ContentKeys(home / KEYS_FOLDER, server.store, server.blobs)
        for _ in range(3):
            keys.answer(FLEET, DEVICE, [], [])
    assert caplog.text.count("gets no content keys") == 1


def test_a_record_of_a_key_comes_back(home: Path) -> None:
    record = ContentKeyRecord(blob=digest_of(b"x"), locked=bytes(range(60)))
    with opened(home) as server:
        server.store.save([record])
        assert server.store.content_key(record.blob) == record
        assert server.store.content_key(digest_of(b"y")) is None


# --- what operators are told ----------------------------------------------------------------------------------------


def test_an_operator_sees_what_is_encrypted_and_who_cannot_take_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, health = write_model(home.parent / "m.onnx", 1), write_health(home.parent / "h.json")
    certify(home)
    for device in (DEVICE, DeviceId("pi-2"), DeviceId("pi-3")):
        report(home, device)
    report(home, DeviceId("pi-4"), "other")
    name = ["digits", "1"]
    words = ["--runtime", "onnx", "--health", str(health), "--dir", str(home), "--encrypt"]

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--dir", str(home)]) == 0
        return capsys.readouterr().out

    assert ", encrypted" in run("release", "add", *name, str(model), *words)
    assert "draft, encrypted" in run("release", "list")
    run("release", "publish", *name)
    for action in ("show", "inspect"):
        shown = run("release", action, *name)
        assert "UTC, encrypted" in shown
        assert "2 device(s) will refuse it: pi-2, pi-3" in shown
    value = json.loads(run("release", "show", *name, "--json"))
    assert value["is_encrypted"] is True
    assert value["shut_out"] == ["pi-2", "pi-3"]
    started = json.loads(run("rollout", "start", *name, "--json"))
    assert started["shut_out"] == ["pi-2", "pi-3"]


def test_nobody_is_shut_out_of_what_all_can_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(home, "1", 1)
    report(home, DEVICE)
    capsys.readouterr()
    assert main(["rollout", "start", "digits", "1", "--dir", str(home)]) == 0
    assert "certificate" not in capsys.readouterr().out
