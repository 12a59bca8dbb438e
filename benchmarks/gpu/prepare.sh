#!/usr/bin/env bash
# prepare.sh PYTHON CIFAR10_JPEG.tar.xz: make .gpu/ in the checkout, with the packages and images that a machine with
# Python 3.12 and PyTorch, but without a network, lacks (about 42 MB).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?a Python with pip} images=${2:?the images, cifar10-jpeg.tar.xz}
rm -rf .gpu && mkdir -p .gpu/site
get() {
    "$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --implementation cp --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --target "$@"
}
get .gpu/site torchattacks==3.5.1 pyautoattack==0.2.0 pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.8.0 \
    typing-inspection==0.4.5 setuptools==81.0.0 timm==1.0.9 gdown==5.1.0 geotorch==0.4.0 beautifulsoup4 soupsieve \
    nvidia-ml-py==13.615.71
rm -rf .gpu/site/robustbench .gpu/site/tests # of 2022, from torchattacks' wheel
get .gpu/robustbench robustbench==1.1.1
mv .gpu/robustbench/robustbench .gpu/robustbench/robustbench-1.1.1.dist-info .gpu/site/
rm -rf .gpu/robustbench .gpu/site/bin .gpu/site/pyautoattack/examples .gpu/site/example.py
cp "$images" .gpu/cifar10-jpeg.tar.xz
du -sh .gpu
