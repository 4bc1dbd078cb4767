#!/bin/sh
# tools/deps.sh [fuzz | qemu] - installs what building and testing need and a fresh Debian 12 lacks.
# Does nothing when all of it is there.  Other systems: install the same libraries by hand.
set -eu
cd "$(dirname "$0")/.."
libs="libc6-dev libjansson-dev libpcre2-dev libutf8proc-dev libzip-dev libxxhash-dev libarchive-dev libcmocka-dev"
want="gcc make pkg-config $libs libopenmpi-dev openmpi-bin jq procps"
[ "${1:-}" = fuzz ] && want="$want clang libclang-rt-dev"
[ "${1:-}" = qemu ] && want="$want gcc-aarch64-linux-gnu qemu-user"

# The libraries of arm64 go into a folder beside the system, not into it: apt resolves them from an empty list of
# installed packages, and nothing here has to be of the same version.
arm64_root() {
    root=build-arm64/root
    [ "$(cat $root/packages 2>/dev/null)" = "$libs" ] && return
    echo "deps.sh: unpacking arm64 libraries into $root"
    rm -rf $root
    apt=$(mktemp -d)
    trap 'rm -rf "$apt"' EXIT
    mkdir -p $root "$apt/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    set -- -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Acquire::Retries=3 \
        -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
    # shellcheck disable=SC2086
    apt-get "$@" update && apt-get "$@" -y -d --no-install-recommends install $libs >/dev/null || {
        echo "deps.sh: Debian's arm64 packages cannot be had, so nothing can run as aarch64" >&2
        exit 1
    }
    for deb in "$apt"/cache/archives/*.deb; do dpkg -x "$deb" $root; done
    # links of the system's root, such as that of libm.so, become links inside this one
    find $root -lname '/*' | while read -r link; do ln -sfr "$root$(readlink "$link")" "$link"; done
    echo "$libs" >$root/packages
}
if [ "${1:-}" = qemu ] && [ "$(dpkg --print-architecture 2>/dev/null)" != amd64 ]; then
    echo "deps.sh: other processors are emulated on Debian on x86-64, with its cross compiler, qemu-user and arm64 packages" >&2
    exit 1
fi
if ! command -v dpkg-query >/dev/null; then
    pkg-config --exists jansson libpcre2-8 libutf8proc libzip libxxhash libarchive cmocka && exit 0
    echo "deps.sh: this is no Debian; install a C compiler, make, pkg-config, jq and the libraries jansson, PCRE2, utf8proc," \
         "libzip, xxHash, libarchive and cmocka with their headers" >&2
    exit 1
fi
missing=
for p in $want; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
    echo "deps.sh: installing$missing"
    as_root=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { echo "deps.sh: run as root: apt-get install$missing" >&2; exit 1; }
        as_root=sudo
    fi
    $as_root apt-get update -qq
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
[ "${1:-}" != qemu ] || arm64_root
