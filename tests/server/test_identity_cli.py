"""`whimbrel devices …` and `whimbrel broker …` as a person would type them, and what they leave on the disk."""

import io
import json
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from protocol.errors import MissingKeyError, RequestError
from protocol.identity import certificate_request, decode_claim, fingerprint, make_key
from protocol.ids import DeviceId, FleetId
from protocol.messages import BUNDLE_BYTES_MAX
from protocol.topics import REQUEST_SHARDS, Topics
from server import operations
from server.adapters.authority import PASSPHRASE_VARIABLE, Authority
from server.adapters.clock import SystemClock
from server.adapters.tls import client_context
from server.broker_files import BrokerLayout, layout_files, rule_files
from server.cli import main
from server.config import config_text, read_config
from server.fleet.identities import use_claim
from server.home import opened
from server.identity import tls_settings

Run = Callable[..., Any]
TOPICS = Topics(FleetId("lab"))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a new server folder; returns its JSON, or its error line when it fails with `code`."""
    monkeypatch.setenv("WHIMBREL_DIR", str(tmp_path / "server"))
    monkeypatch.chdir(tmp_path)
    operations.init_repository(tmp_path / "server", "lab")

    def run(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"] if code == 0 else words) == code
        out, err = capsys.readouterr()
        if code == 0:
            return json.loads(out)
        assert out == ""
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "server"


def ask(home: Path, text: str) -> str:
    """A device that makes a claim good; gives the fingerprint that it would print."""
    claim, key = decode_claim(text), make_key()
    topic = TOPICS.claim_request(claim.claim)
    request = certificate_request(claim.device, key, claim.private_key, topic)
    with opened(home) as there:
        now_ms = SystemClock().now_ms()
        there.store.change_identities(lambda known: use_claim(known, claim.claim, request, topic, now_ms))
    return fingerprint(key.public_key())


def test_a_device_goes_from_a_claim_to_a_certificate_and_is_revoked(run: Run, home: Path) -> None:
    claim = run("devices", "claim", "shelf-7", "--hours", "1")
    assert decode_claim(claim["claim"]).device == claim["device"] == "shelf-7"
    assert run("devices", "pending") == []
    printed = ask(home, claim["claim"])
    (waiting,) = run("devices", "pending")
    assert (waiting["device"], waiting["fingerprint"]) == ("shelf-7", printed)
    accepted = run("devices", "accept", "shelf-7", "--fingerprint", printed)
    assert accepted["name"] == "shelf-7"
    (listed,) = run("devices", "certificates")
    assert (listed["serial"], listed["role"], listed["revoked_ms"]) == (accepted["serial"], "device", None)
    assert "has a certificate" in run("devices", "claim", "shelf-7", code=1)
    assert run("devices", "revoke", "shelf-7") == {"name": "shelf-7", "files": []}
    assert run("devices", "certificates")[0]["revoked_ms"] > 0
    assert run("devices", "claim", "shelf-7")["device"] == "shelf-7"
    assert run("devices") == []


def test_a_claim_is_written_for_nobody_else_to_read(run: Run, tmp_path: Path) -> None:
    run("devices", "claim", "shelf-7", "-o", "shelf-7.claim")
    path = tmp_path / "shelf-7.claim"
    assert path.stat().st_mode & 0o777 == 0o600
    assert decode_claim(path.read_text()).device == "shelf-7"


def test_another_fingerprint_and_an_operator_who_says_no_give_nothing(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = ask(home, run("devices", "claim", "shelf-7")["claim"])
    assert f"has the fingerprint {printed}" in run(
        "devices", "accept", "shelf-7", "--fingerprint", "x", code=1
    )
    assert "nobody has compared" in run("devices", "accept", "shelf-7", code=1)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert "not accepted" in run("devices", "accept", "shelf-7", code=1)
    assert run("devices", "certificates") == []
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert run("devices", "accept", "shelf-7")["name"] == "shelf-7"


def test_what_waits_for_nobody_cannot_be_accepted_or_refused(run: Run, home: Path) -> None:
    for action in ("accept", "refuse"):
        assert "waits for no certificate" in run("devices", action, "shelf-7", code=1)
    assert "no valid certificate and no claim" in run("devices", "revoke", "shelf-7", code=1)
    ask(home, run("devices", "claim", "shelf-7")["claim"])
    run("devices", "refuse", "shelf-7")
    assert "waits for no certificate" in run("devices", "accept", "shelf-7", "--yes", code=1)


@pytest.mark.parametrize(
    "name", ["#", "+", "shelf/7", "Shelf-7", "server.lab", "claim.0123456789abcdef", "a" * 65, ""]
)
def test_38_a_name_that_could_widen_a_rule_gets_no_claim(run: Run, home: Path, name: str) -> None:
    assert "device id" in run("devices", "claim", name, code=1)
    assert not (home / "ca").exists() or run("devices", "certificates") == []


def test_every_action_prints_for_people_too(run: Run, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(home, run("devices", "claim", "shelf-7")["claim"])
    texts = []
    for words in (
        ["devices", "pending"],
        ["devices", "accept", "shelf-7", "--yes"],
        ["devices", "certificates"],
        ["broker", "config", "-o", "broker", "--host", "127.0.0.1"],
        ["devices", "revoke", "shelf-7"],
        ["broker", "cert", "--server", "second", "-o", "second"],
        ["broker", "revoke", "second"],
    ):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert "shelf-7  " in texts[0]
    assert "has a certificate for the key" in texts[1]
    assert "FINGERPRINT" in texts[0]
    assert 'certificate = "tls/server.pem"' in texts[3]
    assert "systemctl reload mosquitto" in texts[4]


def test_the_folder_is_found_before_and_after_the_action(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations.init_repository(home, "lab")
    monkeypatch.chdir(tmp_path)
    for words in (["devices", "--dir", str(home), "pending"], ["devices", "pending", "--dir", str(home)]):
        assert main(words) == 0


def test_a_broker_gets_everything_and_the_server_its_own_certificate(
    run: Run, home: Path, tmp_path: Path
) -> None:
    run(
        "broker",
        "config",
        "-o",
        "broker",
        "--host",
        "127.0.0.1",
        "--host",
        "broker.local",
        "--path",
        "/etc/mosquitto/whimbrel",
    )
    folder = tmp_path / "broker"
    assert {path.name for path in folder.iterdir()} == {
        "mosquitto.conf", "acl", "acl-claims", "ca.pem", "ca-claims.pem", "broker.pem", "broker.key", "revoked.pem",
    }  # fmt: skip
    assert (folder / "broker.key").stat().st_mode & 0o777 == 0o600
    for path in home.rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    names = x509.load_pem_x509_certificate((folder / "broker.pem").read_bytes()).extensions
    hosts = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(host) for host in hosts.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert hosts.get_values_for_type(x509.DNSName) == ["broker.local"]
    text = (folder / "mosquitto.conf").read_text()
    assert set(re.findall(r"/\S+/(?=\w)", text)) >= {"/etc/mosquitto/whimbrel/"}
    assert str(tmp_path) not in text
    assert isinstance(client_context(home, tls_settings()), ssl.SSLContext)
    revoked = x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())
    assert len(list(revoked)) == 0
    assert revoked.next_update_utc is not None
    assert revoked.next_update_utc.year > 2040  # a list that expires would shut everybody out


def test_what_is_good_stays_when_the_files_are_written_again(run: Run, tmp_path: Path) -> None:
    config = ["broker", "config", "-o", "broker"]
    assert "by which names" in run(*config, code=1)
    run(*config, "--host", "127.0.0.1")
    key = (tmp_path / "broker/broker.key").read_bytes()
    run(*config)
    assert (tmp_path / "broker/broker.key").read_bytes() == key
    run(*config, "--host", "other.local")
    assert (tmp_path / "broker/broker.key").read_bytes() != key
    run("broker", "cert", "-o", "elsewhere", "--host", "127.0.0.1")
    assert (tmp_path / "elsewhere/broker.pem").exists()


@pytest.mark.parametrize("host", ["broker:8883", "*.local", "", "a b", "mqtts://broker", "-x"])
def test_a_host_that_is_none_is_refused(run: Run, host: str) -> None:
    assert "neither the name of a host nor an address" in run(
        "broker", "config", "-o", "broker", f"--host={host}", code=1
    )


def test_a_second_server_may_publish_until_it_is_revoked(run: Run, tmp_path: Path) -> None:
    run("broker", "config", "-o", "broker", "--host", "127.0.0.1")
    run("broker", "cert", "--server", "second", "-o", "second")
    rules = tmp_path / "broker/acl"
    assert "user server.second\ntopic readwrite wb1.lab/#" in rules.read_text()
    run("broker", "revoke", "second")
    assert "user server.second\ntopic deny #" in rules.read_text()
    assert "user server.lab\ntopic readwrite" in rules.read_text()
    assert len(list(x509.load_pem_x509_crl((tmp_path / "broker/revoked.pem").read_bytes()))) == 1
    assert "no valid certificate" in run("broker", "revoke", "second", code=1)


def test_a_passphrase_encrypts_the_keys_of_the_authorities(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, str(secret))
    run("broker", "config", "-o", "broker", "--host", "127.0.0.1")
    pem = (home / "ca/devices.key").read_bytes()
    with pytest.raises(TypeError):
        load_pem_private_key(pem, None)
    text = run("devices", "claim", "shelf-7")["claim"]
    ask(home, text)
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    error = run("devices", "accept", "shelf-7", "--yes", code=1)
    assert "devices.key is encrypted" in error
    assert PASSPHRASE_VARIABLE in error
    for wrong, said in (("wrong\n", "is the passphrase right?"), ("\n", "empty first line")):
        secret.write_text(wrong)
        monkeypatch.setenv(PASSPHRASE_VARIABLE, str(secret))
        assert said in run("devices", "accept", "shelf-7", "--yes", code=1)
    secret.unlink()
    assert "passphrase: No such file" in run("devices", "accept", "shelf-7", "--yes", code=1)
    secret.write_text("correct horse\n")
    assert run("devices", "accept", "shelf-7", "--yes")["name"] == "shelf-7"


def test_an_authority_is_made_once_and_damage_is_named(home: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with pytest.raises(RequestError, match="there is no certificate authority"):
        authority.pem()
    authority.create(FleetId("lab"), SystemClock().now_ms())
    with pytest.raises(RequestError, match="never overwritten"):
        authority.create(FleetId("lab"), SystemClock().now_ms())
    authority.check_key()
    key = tmp_path / "ca/devices.key"
    other = (tmp_path / "ca/claims.key").read_bytes()
    for data, said in ((other, "is not the key of the certificate"), (b"nonsense", "cannot be read")):
        key.write_bytes(data)
        with pytest.raises(MissingKeyError, match=said):
            Authority(tmp_path / "ca").check_key()
    (tmp_path / "ca/claims.pem").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match=r"claims\.pem.*from your copy"):
        Authority(tmp_path / "ca").pem("claims")
    key.unlink()
    with pytest.raises(MissingKeyError, match=r"devices\.key"):
        Authority(tmp_path / "ca").issue_device(DeviceId("a"), make_key().public_key(), 0, 1)
    del home


def test_settings_with_certificates_survive_being_written(home: Path, run: Run) -> None:
    del run
    text = config_text(read_config(home)).replace('"embedded"', '"127.0.0.1:8883"')
    (home / "whimbrel.toml").write_text(text + '\n[tls]\nca = "a"\ncertificate = "b"\nkey = "c"\n')
    config = read_config(home)
    assert config.tls is not None
    assert (config.tls.ca, config.tls.certificate, config.tls.key) == ("a", "b", "c")
    (home / "whimbrel.toml").write_text(config_text(config))
    assert read_config(home) == config
    with pytest.raises(RequestError, match=r"a: No such file"):
        client_context(home, config.tls)


def test_certificates_with_the_embedded_broker_are_refused(run: Run, home: Path) -> None:
    settings = home / "whimbrel.toml"
    settings.write_text(settings.read_text() + '\n[tls]\nca = "a"\ncertificate = "b"\nkey = "c"\n')
    assert "speaks plainly and on loopback only" in run("devices", code=1)


def test_emqx_gets_the_same_rules_and_limits() -> None:
    """Texts only: they are not tried with a running EMQX."""
    layout = BrokerLayout(fleet=FleetId("lab"), folder="/etc/emqx/whimbrel", devices_max=5)
    conf = layout_files("emqx", layout)["emqx.conf"]
    assert conf.count("fail_if_no_peer_cert = true") == 2
    assert "no_match = deny" in conf
    assert "peer_cert_as_clientid = cn" in conf
    assert f"max_packet_size = {BUNDLE_BYTES_MAX // 1024 + 4}KB" in conf
    assert "cache.enable = false" in conf  # a revocation must not wait for one
    rules = rule_files("emqx", FleetId("lab"), ["server.lab"], ["stolen"])["acl.conf"].splitlines()
    assert '{deny, {username, "stolen"}, all, ["#"]}.' in rules
    assert rules.index('{deny, {username, "stolen"}, all, ["#"]}.') < rules.index(
        '{allow, {username, "server.lab"}, all, ["wb1.lab/#"]}.'
    )
    assert rules[-1] == "{deny, all}."
    device = next(line for line in rules if "publish" in line and "report" in line)
    assert "wb1.lab/dev/${username}/report" in device
    topics = re.findall(r'"(wb1[^"]*)"', device)
    assert len(topics) == 3 + REQUEST_SHARDS
    assert not any("+" in topic or "#" in topic for topic in topics)
