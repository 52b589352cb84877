#!/usr/bin/env bash
# Install SGLang and its router into a virtual environment of their own, apart from the trainer, which needs other
# versions:
#   docker/install_sglang.sh DIRECTORY cuda|cpu [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:?usage: docker/install_sglang.sh DIRECTORY cuda|cpu [PYTHON]}
kind=${2:?usage: docker/install_sglang.sh DIRECTORY cuda|cpu [PYTHON]}
python=${3:-python3}
# make would split them, or run what stands in them as $(shell ...).
if [[ ! $target$python =~ ^[A-Za-z0-9._/+@-]+$ ]]; then
    echo "install_sglang.sh: error: $(printf '%q %q' "$target" "$python"): give paths of letters, digits and ._/+@-" >&2
    exit 1
fi

# NVIDIA's image holds every package at the version of its own torch.
unset PIP_CONSTRAINT
case $kind in
    cuda)
        "$python" -m venv "$target"
        "$target/bin/python" -m pip install --no-cache-dir --no-deps -r requirements/sglang_cuda.txt
        ;;
    cpu) make sglang-cpu SGLANG_VENV="$target" PYTHON="$python" ;;
    *)
        echo "install_sglang.sh: error: $kind: write cuda or cpu" >&2
        exit 1
        ;;
esac
