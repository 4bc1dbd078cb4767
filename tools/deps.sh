#!/bin/sh
# tools/deps.sh [fuzz] - installs what building and testing need and a fresh Debian 12 lacks.
# Does nothing when all of it is there.  Other systems: install the same libraries by hand.
set -eu
want="gcc make pkg-config libc6-dev libjansson-dev libpcre2-dev libutf8proc-dev libzip-dev libxxhash-dev libarchive-dev libopenmpi-dev openmpi-bin libcmocka-dev jq"
[ "${1:-}" = fuzz ] && want="$want clang libclang-rt-dev"
if ! command -v dpkg-query >/dev/null; then
    pkg-config --exists jansson libpcre2-8 libutf8proc libzip libxxhash cmocka && exit 0
    echo "deps.sh: this is no Debian; install a C compiler, make, pkg-config, jq and the libraries jansson, PCRE2, utf8proc," \
         "libzip, xxHash and cmocka with their headers" >&2
    exit 1
fi
missing=
for p in $want; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
[ -z "$missing" ] && exit 0
echo "deps.sh: installing$missing"
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "deps.sh: run as root: apt-get install$missing" >&2; exit 1; }
    as_root=sudo
fi
$as_root apt-get update -qq
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
