#!/usr/bin/env bash
# run.sh SECONDS STAGES [OPTIONS]: on the machine with the GPU, in the checkout with .gpu/; results go to $OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD/.gpu/site OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
{
    images=/dev/shm/cifar10-jpeg
    if [ ! -e $images ]; then
        rm -rf $images.part && mkdir -p $images.part
        if tar xJf .gpu/cifar10-jpeg.tar.xz -C $images.part; then
            mv $images.part $images
        else
            echo "no images: decode, table1, full and parity will fail, the other stages run"
        fi
    fi
    python3 -m benchmarks.gpu "$2" --budget "$(($1 - SECONDS))" "${@:3}"
} 2>&1 | tee "$OUT/log-$(date +%H%M%S).txt"
