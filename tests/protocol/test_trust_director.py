"""Whom signed metadata names director: keys that a device could check a wish with, and no others (SPEC section 8.4)."""

import pytest
from securesystemslib.signer import CryptoSigner, Key, SSlibKey  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api.metadata import DelegatedRole, Metadata, Targets  # type: ignore[attr-defined]  # likewise

from protocol.director import DIRECTOR_KEYS_MAX
from protocol.errors import TrustError
from protocol.release import ARTIFACTS_ROLE, DIRECTOR_ROLE
from tests.protocol.metadata import DIGITS, Author, Believer, key, signed


def named(*keys: Key, threshold: int = 1, unknown: str = "") -> tuple[bytes, ...] | None:
    """Whom a device holds for the director where targets names `keys`, and an id that no key stands behind."""
    author = Author()
    author.documents()
    targets = Metadata[Targets].from_bytes(author.top_targets(by=[])).signed
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    if keys:
        ids = [*([unknown] if unknown else []), *(each.keyid for each in keys)]
        targets.delegations.roles[DIRECTOR_ROLE] = DelegatedRole(
            DIRECTOR_ROLE, ids, threshold, terminating=False, paths=["director/*"]
        )
        targets.delegations.keys.update({each.keyid: each for each in keys})
    device = Believer(author.roots[0])
    device.roles = (DIGITS, ARTIFACTS_ROLE)
    return device.refresh(author.assembled(targets=signed(targets, author.signers["targets"]))).director


def public(name: str) -> bytes:
    return bytes.fromhex(key(name).public_key.keyval["public"])


def ed25519(keyid: str, value: str) -> Key:
    return SSlibKey(keyid * 64, "ed25519", "ed25519", {"public": value})


def test_a_fleet_without_a_director_has_none() -> None:
    assert named() is None


def test_the_keys_of_the_director_are_known_in_their_order() -> None:
    assert named(key("d1").public_key, key("d2").public_key) == (public("d1"), public("d2"))


def test_a_director_of_several_signatures_signs_no_wish() -> None:
    assert named(key("d1").public_key, key("d2").public_key, threshold=2) == ()


@pytest.mark.parametrize(
    "useless",
    [
        CryptoSigner.generate_ecdsa().public_key,
        SSlibKey("a" * 64, "rsa", "rsassa-pss-sha256", {"public": "ab" * 32}),
        ed25519("b", "ab" * 31),
        ed25519("c", "ab" * 33),
        ed25519("d", "not hexadecimal"),
        ed25519("e", ""),
    ],
    ids=["ecdsa", "rsa", "short", "long", "no hexadecimal", "empty"],
)
def test_a_key_that_no_wish_can_be_checked_with_is_passed_over(useless: Key) -> None:
    assert named(useless, key("d1").public_key) == (public("d1"),)
    assert named(useless) == ()


def test_no_more_keys_are_tried_than_fit_into_the_record() -> None:
    names = [f"d{number}" for number in range(DIRECTOR_KEYS_MAX + 2)]
    found = named(*(key(name).public_key for name in names))
    assert found == tuple(public(name) for name in names[:DIRECTOR_KEYS_MAX])


def test_an_id_that_no_key_stands_behind_is_passed_over() -> None:
    assert named(key("d1").public_key, unknown="f" * 64) == (public("d1"),)


def test_one_key_under_two_ids_is_no_director() -> None:
    again = key("d1").public_key.keyval["public"]
    with pytest.raises(TrustError, match="director"):
        named(key("d1").public_key, ed25519("f", again))
