#!/usr/bin/env bash
# Debian's SLURM, for tests/slurm: needs root and apt-get, about 20 seconds and 8 packages. Starts nothing.
set -euo pipefail
if command -v slurmctld slurmd sbatch munged > /dev/null; then
    exit 0
fi
if [[ $EUID -ne 0 ]] || ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed, and installing it needs root and apt-get" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# packages of daemons try to start them: there is no need, the tests run their own
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
