"""Encryption of artifacts: the cipher against AES itself, the wrapping against everything that it is bound to, and how targets are called."""

import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    DelegatedRole,
)

from protocol.chunks import build_tree
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.delta_graph import edges_of
from protocol.encryption import (
    ContentCipher,
    content_key_name,
    make_content_key,
    unwrap_key,
    wrap_key,
)
from protocol.errors import ContentKeyError
from protocol.identity import make_key
from protocol.ids import DeviceId, Digest, FleetId, digest_of
from protocol.release import (
    ArtifactCustom,
    DeltaName,
    Encryption,
    delta_target,
    file_target,
    parse_delta_target,
    parse_file_target,
    role_paths,
)
from protocol.trust import Target

FLEET, DEVICE, BLOB = FleetId("lab"), DeviceId("pi-1"), digest_of(b"artifact")
BASE, RESULT = digest_of(b"base"), digest_of(b"result")


def test_the_cipher_is_aes_256_over_a_counter_of_blocks() -> None:
    key = bytes(range(32))
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(blocks.update(number.to_bytes(16, "big")) for number in range(64))
    assert ContentCipher(key)(0, bytes(1000)) == stream[:1000]


def test_a_chunk_is_encrypted_alone_as_it_is_within_the_whole() -> None:
    data = random.Random(1).randbytes(3 * CHUNK_BYTES + 5)
    cipher = ContentCipher(make_content_key())
    whole = cipher(0, data)
    assert whole != data
    assert CHUNK_BYTES % 16, "or no chunk would begin within a block"
    for offset in (0, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, 1, 15, 16, 17):
        part = data[offset : offset + CHUNK_BYTES]
        assert cipher(offset, part) == whole[offset : offset + len(part)]
        assert cipher(offset, whole[offset : offset + len(part)]) == part


def test_offsets_beyond_32_bits_of_blocks_do_not_come_back_to_the_beginning() -> None:
    cipher = ContentCipher(make_content_key())
    streams = {cipher(offset, bytes(64)) for offset in (0, 1 << 36, 1 << 39, (1 << 40) - 64)}
    assert len(streams) == 4


def test_a_wrapped_key_opens_for_whom_and_for_what_it_was_made() -> None:
    recipient, key = make_key(), make_content_key()
    wrapped = wrap_key(key, recipient.public_key(), FLEET, DEVICE, BLOB)
    assert unwrap_key(wrapped, recipient, FLEET, DEVICE, BLOB) == key
    assert key not in wrapped
    assert wrapped != wrap_key(key, recipient.public_key(), FLEET, DEVICE, BLOB)


@pytest.mark.parametrize(
    ("fleet", "device", "blob"),
    [
        (FleetId("other"), DEVICE, BLOB),
        (FLEET, DeviceId("pi-2"), BLOB),
        (FLEET, DEVICE, digest_of(b"another artifact")),
    ],
)
def test_a_wrapped_key_opens_for_nothing_else(fleet: FleetId, device: DeviceId, blob: Digest) -> None:
    recipient = make_key()
    wrapped = wrap_key(make_content_key(), recipient.public_key(), FLEET, DEVICE, BLOB)
    with pytest.raises(ContentKeyError):
        unwrap_key(wrapped, recipient, fleet, device, blob)


def test_a_wrapped_key_that_was_changed_or_is_for_somebody_else_opens_nothing() -> None:
    recipient = make_key()
    wrapped = wrap_key(make_content_key(), recipient.public_key(), FLEET, DEVICE, BLOB)
    with pytest.raises(ContentKeyError):
        unwrap_key(wrapped, make_key(), FLEET, DEVICE, BLOB)
    for damaged in (b"", wrapped[:-1], wrapped + b"\0", bytes(len(wrapped))):
        with pytest.raises(ContentKeyError):
            unwrap_key(damaged, recipient, FLEET, DEVICE, BLOB)
    for at in range(0, len(wrapped), 7):
        changed = wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :]
        with pytest.raises(ContentKeyError):
            unwrap_key(changed, recipient, FLEET, DEVICE, BLOB)


def test_a_key_of_another_length_is_none() -> None:
    recipient = make_key()
    wrapped = wrap_key(bytes(16), recipient.public_key(), FLEET, DEVICE, BLOB)
    with pytest.raises(ContentKeyError, match="16 bytes"):
        unwrap_key(wrapped, recipient, FLEET, DEVICE, BLOB)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_names_of_targets_come_back_and_are_delegated(profile: Profile, is_encrypted: bool) -> None:
    name = DeltaName(BASE, RESULT, profile, is_encrypted)
    assert parse_delta_target(delta_target(*name)) == name
    assert parse_file_target(delta_target(*name)) is None
    path = file_target(RESULT, is_encrypted=is_encrypted)
    assert parse_file_target(path) == (RESULT, is_encrypted)
    assert parse_delta_target(path) is None
    # Repositories that were made before need no new delegation.
    role = DelegatedRole("artifacts", ["k"], 1, terminating=True, paths=list(role_paths("artifacts")))
    assert role.is_delegated_path(path)
    assert role.is_delegated_path(delta_target(*name))


@pytest.mark.parametrize(
    "path", ["files/", "files/x", f"files/{RESULT}.gz", f"files/{RESULT}.encrypted/fast", f"{RESULT}", ""]
)
def test_other_paths_are_no_whole_files(path: str) -> None:
    assert parse_file_target(path) is None


def test_an_artifact_whose_path_and_content_do_not_agree_leads_nowhere() -> None:
    tree = build_tree([])[0]
    secret = ArtifactCustom(chunks=tree, encryption=Encryption(key=content_key_name(bytes(32))))
    open_to_all = ArtifactCustom(chunks=tree)
    right = [
        Target(file_target(BASE), 10, BASE, open_to_all),
        Target(file_target(RESULT, is_encrypted=True), 10, BLOB, secret),
        Target(delta_target(BASE, RESULT, is_encrypted=True), 5, BLOB, secret),
    ]
    key = content_key_name(bytes(32))
    of_the_future = ArtifactCustom(chunks=tree, encryption=Encryption(cipher="aes-512-ctr", key=key))
    wrong = [
        Target(file_target(RESULT, is_encrypted=True), 10, BLOB, of_the_future),
        Target(delta_target(BASE, RESULT, is_encrypted=True), 5, BLOB, of_the_future),
        Target(file_target(BASE), 10, BASE, secret),
        Target(file_target(BASE), 10, RESULT, open_to_all),
        Target(file_target(RESULT, is_encrypted=True), 10, BLOB, open_to_all),
        Target(delta_target(BASE, RESULT), 5, BLOB, secret),
        Target(delta_target(BASE, RESULT, is_encrypted=True), 5, BLOB, open_to_all),
    ]
    edges = edges_of({target.path: target for target in right}, {})
    assert [(edge.base, edge.result, edge.is_encrypted) for edge in edges] == [
        (None, BASE, False),
        (None, RESULT, True),
        (BASE, RESULT, True),
    ]
    for target in wrong:
        assert edges_of({target.path: target}, {RESULT: 10}) == []
