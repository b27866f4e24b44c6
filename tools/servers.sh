#!/usr/bin/env bash
# Install from Debian what tests/servers.py starts and PyPI does not have: PostgreSQL and Redis. Does nothing when they are there.
# Only the programs: while they are installed, Debian is told to start no service, and the tests start their own.
set -euo pipefail

missing=()
command -v redis-server >/dev/null || missing+=(redis-server)
command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
[ ${#missing[@]} = 0 ] && exit
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "servers: ${missing[*]} missing, and this is not root on Debian or Ubuntu; install them, or run sudo tools/servers.sh there" >&2
  exit 1
fi

policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "servers: apt-get could not install ${missing[*]}" >&2
  exit 1
fi
rm -f "$log"
