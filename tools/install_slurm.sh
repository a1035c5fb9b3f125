#!/usr/bin/env bash
# Installs what tests/slurm needs, on Debian or Ubuntu as root. Its services are not started: the tests bring up a
# cluster of their own, with its own configuration and keys, and end it again.
set -euo pipefail
packages=(munge slurmctld slurmd slurm-client iproute2 environment-modules)

if [ "$(dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null | grep -cx installed)" = ${#packages[@]} ]; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install_slurm.sh: needs root and Debian's apt-get; nothing installed" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy # start no service
  chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
echo "install_slurm.sh: installed ${packages[*]}"
