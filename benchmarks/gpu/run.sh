#!/usr/bin/env bash
# run.sh SECONDS STAGES [OPTIONS]: on the machine with the GPU, in the checkout with .gpu/; results go to $OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD/.gpu/site OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
{
    if [ ! -e /dev/shm/cifar10-jpeg/test ]; then
        mkdir -p /dev/shm/cifar10-jpeg && tar xJf .gpu/cifar10-jpeg.tar.xz -C /dev/shm/cifar10-jpeg
    fi
    python3 -m benchmarks.gpu "$2" --budget "$(($1 - SECONDS))" "${@:3}"
} 2>&1 | tee "$OUT/log-$(date +%H%M%S).txt"
