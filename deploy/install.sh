#!/bin/sh
# Installs the Whimbrel agent on Debian, Raspberry Pi OS or Ubuntu, from the folder that `make deb` filled. Read it before you run it.
#
#   sudo sh install.sh --from DIRECTORY_OR_URL [--sha256 DIGEST] [--device NAME --fleet NAME --family NAME --broker HOST:PORT] [--factory DIRECTORY]
#                      [--claim FILE]
#
# It takes the package for this processor and this Python, compares it with SHA256SUMS of the same place (or with DIGEST, which you
# had on another way), and installs it with apt. With --device and the others it writes /etc/whimbrel/device.d/50-local.toml; with
# --factory it provisions the device with the folder that `whimbrel release export` wrote, and starts it; with --claim it writes
# /etc/whimbrel/device.d/51-tls.toml, and gets a certificate with what `whimbrel devices claim` gave. Nothing else is changed.
set -eu

say() { printf '%s\n' "install.sh: $*"; }
fail() { say "$*" >&2; exit 1; }

main() {
    from='' digest='' device='' fleet='' family='' broker='' factory='' claim=''
    while [ $# -gt 0 ]; do
        case "$1" in
            --from | --sha256 | --device | --fleet | --family | --broker | --factory | --claim) [ $# -ge 2 ] || fail "$1 needs a value" ;;
            -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
            *) fail "unknown option $1 (see --help)" ;;
        esac
        case "$1" in
            --from) from=$2 ;;
            --sha256) digest=$2 ;;
            --device) device=$2 ;;
            --fleet) fleet=$2 ;;
            --family) family=$2 ;;
            --broker) broker=$2 ;;
            --factory) factory=$2 ;;
            --claim) claim=$2 ;;
        esac
        shift 2
    done
    [ -n "$from" ] || fail "say where the packages are: --from DIRECTORY_OR_URL"
    [ "$(id -u)" = 0 ] || fail "run it as root: sudo sh install.sh ..."
    command -v dpkg >/dev/null || fail "this is no Debian, Raspberry Pi OS or Ubuntu; docs/device.md shows the way with pip"
    [ -z "$factory" ] || [ -f "$factory/release.json" ] || fail "$factory has no release.json: give what 'whimbrel release export' wrote"
    [ -z "$claim" ] || [ -f "$claim" ] || fail "$claim is not there: give what 'whimbrel devices claim DEVICE -o FILE' wrote"
    names="$device$fleet$family$broker"
    if [ -n "$names" ]; then
        for value in "$device" "$fleet" "$family" "$broker"; do
            [ -n "$value" ] || fail "give --device, --fleet, --family and --broker together"
            case "$value" in *[!A-Za-z0-9.:_-]*) fail "'$value' has characters that no name or address has" ;; esac
        done
    fi

    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch" # apt reads the package as another user
    fetch SHA256SUMS
    package=$(choose)
    fetch "$package"
    verify "$package"
    say "installing $package"
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --reinstall --allow-downgrades "$scratch/$package"

    if [ -n "$names" ]; then
        printf 'device = "%s"\nfleet = "%s"\nfamily = "%s"\nbroker = "%s"\n' "$device" "$fleet" "$family" "$broker" \
            >/etc/whimbrel/device.d/50-local.toml
        say "wrote /etc/whimbrel/device.d/50-local.toml"
    fi
    if [ -n "$claim" ]; then
        printf '[tls]\n' >/etc/whimbrel/device.d/51-tls.toml
        say "wrote /etc/whimbrel/device.d/51-tls.toml"
    fi
    if [ -n "$factory" ]; then
        if [ -e /var/lib/whimbrel/root.json ]; then
            say "this device is provisioned, its version stays"
        else
            whimbrel-device provision --from "$factory"
        fi
        if [ -d /run/systemd/system ]; then
            systemctl enable --quiet whimbrel-device
            systemctl restart whimbrel-device
            say "it runs: journalctl -u whimbrel-device -f"
        fi
    fi
    if [ -n "$claim" ]; then
        if [ -e /var/lib/whimbrel/identity/identity.pem ]; then
            say "this device has a certificate, which stays"
        else # the agent, where it runs, takes it by itself
            whimbrel-device enroll --claim "$claim" || fail "no certificate yet; go on with: sudo whimbrel-device enroll --claim $claim"
        fi
    fi
    say "done; look at it with: sudo whimbrel-device doctor"
}

# Bring a file of the source into $scratch.
fetch() {
    case "$from" in
        http://* | https://*)
            if command -v curl >/dev/null; then
                curl -fsSL --retry 3 -o "$scratch/$1" "${from%/}/$1" || fail "cannot fetch ${from%/}/$1"
            else
                wget -q -O "$scratch/$1" "${from%/}/$1" || fail "cannot fetch ${from%/}/$1"
            fi
            ;;
        *) cp "$from/$1" "$scratch/$1" || fail "$from/$1 is missing: run 'make deb' there" ;;
    esac
}

# The package for this processor and for a Python that this system has or can get.
choose() {
    architecture=$(dpkg --print-architecture)
    for python in 3.11 3.12 3.13; do
        tag=py$(printf %s "$python" | tr -d .)
        found=$(sed -n "s/^[0-9a-f]\{64\}  \(whimbrel-device_[A-Za-z0-9.+~-]*+${tag}_$architecture\.deb\)$/\1/p" "$scratch/SHA256SUMS" | head -n 1)
        if [ -n "$found" ] && { [ -x "/usr/bin/python$python" ] || apt-cache show "python$python" >/dev/null 2>&1; }; then
            printf %s "$found"
            return
        fi
    done
    fail "$from has no package for $architecture and a Python of this system: build one with 'make deb'"
}

verify() {
    measured=$(sha256sum "$scratch/$1" | cut -d ' ' -f 1)
    wanted=$(sed -n "s/^\([0-9a-f]\{64\}\)  $1$/\1/p" "$scratch/SHA256SUMS")
    [ -z "$digest" ] || wanted=$digest
    [ "$measured" = "$wanted" ] || fail "$1 is damaged or another one: SHA-256 is $measured, and not $wanted"
}

main "$@"
