"""A configuration and its drop-ins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from device.config import CONFIG_BYTES_MAX, DROP_INS_MAX, load_config
from protocol.errors import RequestError

MAIN = 'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\nmemory_mb_max = 100\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "device.toml").write_text(MAIN)
    (tmp_path / "device.d").mkdir()
    return tmp_path


def test_later_files_win_field_by_field(folder: Path) -> None:
    (folder / "device.d" / "20-site.toml").write_text('broker = "10.0.0.2:1883"\nmemory_mb_max = 300\n')
    (folder / "device.d" / "10-package.toml").write_text(
        'memory_mb_max = 200\ntier = "pi"\n[slots]\nin_place = true\n'
    )
    config = load_config(folder / "device.toml")
    assert (config.broker_host, config.agent.memory_bytes_max >> 20) == ("10.0.0.2", 300)
    assert (config.agent.tier, config.agent.device, config.agent.is_in_place) == ("pi", "pi-1", True)
    (folder / "device.d" / "30.toml").write_text("[slots]\nin_place = false\n")
    assert not load_config(folder / "device.toml").agent.is_in_place


def test_a_required_field_may_come_from_a_drop_in(folder: Path) -> None:
    (folder / "device.toml").write_text('state_folder = "state"\nfamily = "digits"\n')
    (folder / "device.d" / "me.toml").write_text('device = "pi-7"\nfleet = "lab"\n')
    config = load_config(folder / "device.toml")
    assert config.agent.device == "pi-7"
    assert config.folder == folder / "state"  # from the main file's folder, whoever names it


def test_only_files_of_the_right_name_count(folder: Path) -> None:
    for name in (".10.toml.swp", ".hidden.toml", "10.toml~", "10.toml.dpkg-old", "README"):
        (folder / "device.d" / name).write_text("nonsense = [")
    assert load_config(folder / "device.toml").agent.memory_bytes_max >> 20 == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_mb_max = 0\n", "memory_mb_max"),
        ('brokr = "x"\n', "unknown field `brokr`"),
        ("[slots]\ninplace = true\n", "unknown field `inplace`"),
        ("slots = 3\n", "slots"),
        ("device = [\n", "Invalid value"),
        ('broker = "nowhere"\n', "not of the form host:port"),
        ('fleet = "#"\n', "fleet '#'"),
        ("state_folder = 7\n", "state_folder"),
        ('[tls]\ncertificate = "a.pem"\n', "only one of certificate and key"),
        ('[tls]\npassword = "x"\n', "unknown field `password`"),
        ("tls = true\n", "tls"),
        ('[serving]\nlisten = "0.0.0.0:8091"\n', "not an address of loopback"),
        ('[serving]\nlisten = "192.168.1.10:8091"\n', "use 127.0.0.1"),
        ('[serving]\nlisten = "pi.local:8091"\n', "not an address of loopback"),
        ('[serving]\nlisten = "8091"\n', "not of the form host:port or unix:PATH"),
        ('[serving]\nlisten = "127.0.0.1:70000"\n', "not of the form"),
        ('[serving]\nlisten = "unix:"\n', "names no path"),
        ("[serving]\nrequests_max = 0\n", "requests_max"),
        ("[serving]\nport = 8091\n", "unknown field `port`"),
        ('[hooks]\nafter_swap = "reload"\n', "after_swap"),
        ("[hooks]\ntimeout_s = 0\n", "timeout_s"),
    ],
)
def test_a_mistake_names_the_file_that_it_is_in(folder: Path, text: str, said: str) -> None:
    (folder / "device.d" / "10-good.toml").write_text("memory_mb_max = 300\n")
    (folder / "device.d" / "20-bad.toml").write_text(text)
    (folder / "device.d" / "30-good.toml").write_text('tier = "pi"\n')
    with pytest.raises(RequestError) as caught:
        load_config(folder / "device.toml")
    assert str(caught.value).startswith(f"{folder / 'device.d' / '20-bad.toml'}: ")
    assert said in str(caught.value)


def test_what_no_file_brings_is_asked_of_the_main_one(folder: Path) -> None:
    (folder / "device.toml").write_text('state_folder = "state"\n')
    (folder / "device.d" / "10.toml").write_text('device = "pi-7"\n')
    with pytest.raises(RequestError, match=r"device.toml: Object missing required field `fleet`"):
        load_config(folder / "device.toml")


def test_files_that_cannot_be_a_configuration_are_refused(folder: Path) -> None:
    big = folder / "device.d" / "big.toml"
    big.write_text("#" * (CONFIG_BYTES_MAX + 1))
    with pytest.raises(RequestError, match=r"big.toml is longer than 65536 bytes"):
        load_config(folder / "device.toml")
    big.unlink()
    (folder / "device.d" / "gone.toml").symlink_to("nowhere")
    with pytest.raises(RequestError, match=r"gone.toml: No such file"):
        load_config(folder / "device.toml")
    (folder / "device.d" / "gone.toml").unlink()
    (folder / "device.d" / "latin.toml").write_bytes(b'tier = "\xe4"\n')
    with pytest.raises(RequestError, match=r"latin.toml: "):
        load_config(folder / "device.toml")
    for number in range(DROP_INS_MAX):
        (folder / "device.d" / f"{number}.toml").touch()
    with pytest.raises(RequestError, match=r"device.d has 65 files, allowed are 64"):
        load_config(folder / "device.toml")


def test_the_control_socket_is_where_the_configuration_says(folder: Path) -> None:
    assert load_config(folder / "device.toml").control == folder / "state" / "pi-1.sock"
    (folder / "device.d" / "10.toml").write_text('runtime_folder = "/run/whimbrel"\n')
    assert os.fspath(load_config(folder / "device.toml").control) == "/run/whimbrel/pi-1.sock"


@pytest.mark.parametrize(
    ("listen", "meant"),
    [
        ("127.0.0.1:8091", ("127.0.0.1", 8091)),
        ("localhost:8091", ("127.0.0.1", 8091)),
        ("[::1]:8091", ("::1", 8091)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("unix:/run/whimbrel/model.sock", Path("/run/whimbrel/model.sock")),
    ],
)
def test_the_endpoint_listens_on_this_device_only(folder: Path, listen: str, meant: object) -> None:
    assert load_config(folder / "device.toml").serving is None
    (folder / "device.d" / "serving.toml").write_text(f'[serving]\nlisten = "{listen}"\nrequest_s_max = 9\n')
    serving = load_config(folder / "device.toml").serving
    assert serving is not None
    assert (serving.listen, serving.requests_max, serving.request_s_max) == (meant, 8, 9.0)


def test_a_relative_socket_and_a_hook_are_taken_as_they_stand(folder: Path) -> None:
    (folder / "device.d" / "a.toml").write_text(
        '[serving]\nlisten = "unix:model.sock"\n[hooks]\nafter_swap = ["systemctl", "--user", "reload", "app"]\n'
    )
    config = load_config(folder / "device.toml")
    assert config.serving is not None
    assert config.serving.listen == folder / "model.sock"
    assert config.hooks.after_swap == ("systemctl", "--user", "reload", "app")
    assert config.hooks.timeout_s == 30


def test_without_a_table_tls_a_device_speaks_plainly(folder: Path) -> None:
    assert load_config(folder / "device.toml").tls is None


def test_an_empty_table_tls_takes_what_enroll_left_in_the_state_folder(folder: Path) -> None:
    (folder / "device.d" / "51-tls.toml").write_text("[tls]\n")
    tls = load_config(folder / "device.toml").tls
    assert tls is not None
    assert tls.is_enrolled
    assert (tls.ca, tls.certificate) == (
        folder / "state/identity/ca.pem",
        folder / "state/identity/identity.pem",
    )
    assert tls.key == tls.certificate


def test_certificates_of_another_authority_are_named_and_not_renewed(folder: Path) -> None:
    (folder / "device.d" / "51-tls.toml").write_text(
        '[tls]\nca = "/etc/ssl/site.pem"\ncertificate = "own.pem"\nkey = "own.key"\n'
    )
    tls = load_config(folder / "device.toml").tls
    assert tls is not None
    assert not tls.is_enrolled
    assert (tls.ca, tls.certificate, tls.key) == (
        Path("/etc/ssl/site.pem"),
        folder / "own.pem",
        folder / "own.key",
    )


def test_an_agent_without_certificates_loads_nothing_for_them() -> None:
    code = "import sys, device.cli; print(sorted(set(sys.modules) & {'protocol.identity', 'cryptography.x509', 'device.adapters.identity'}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
