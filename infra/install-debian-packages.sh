#!/bin/sh
# Installs the Debian packages that some tests drive (a browser, Prometheus) where this machine lets us.
# Never fails: a test whose program is missing is skipped and says which package it wants.
set -u
list="$(dirname "$0")/debian-packages.txt"
missing=""
for package in $(sed 's/#.*//' "$list"); do
    command -v "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
    echo "not installed:$missing (needs root and apt-get); the tests that drive them will be skipped" >&2
    exit 0
fi
# policy-rc.d keeps a service from starting: the tests start their own.
guard=/usr/sbin/policy-rc.d
made=""
if [ ! -e "$guard" ]; then printf '#!/bin/sh\nexit 101\n' >"$guard" && chmod +x "$guard" && made=yes; fi
export DEBIAN_FRONTEND=noninteractive
(apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing) >/dev/null 2>&1 ||
    echo "could not install:$missing; the tests that drive them will be skipped" >&2
[ -n "$made" ] && rm -f "$guard"
exit 0
