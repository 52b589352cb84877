#!/usr/bin/env bash
# Install the trainer into a virtual environment of its own, at the tested versions:
#   docker/install_trainer.sh DIRECTORY [PYTHON]
# Where PYTHON has a torch already, as in NVIDIA's image, that one stays in use, with the Transformer Engine and the
# Apex built for it; what the image's own PIP_CONSTRAINT holds is held there. Elsewhere TORCH (default:
# requirements/trainer.txt's) is installed, from TORCH_INDEX where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:?usage: docker/install_trainer.sh DIRECTORY [PYTHON]}
python=${2:-python3}

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if "$python" -c 'import torch' 2> /dev/null; then
    "$python" -m venv --system-site-packages "$target"
    # Its own versions go first: a package that both name would have to satisfy both.
    held=${PIP_CONSTRAINT:-/dev/null}
    awk -F'[=<>!~;[ @]' 'function name(text) { gsub(/[-_.]+/, "-", text); return tolower(text) }
        FILENAME == ARGV[1] { if ($1 != "") held[name($1)]; next }
        !(name($1) in held) && $1 != "torch"' "$held" requirements/trainer.txt > "$constraints"
else
    "$python" -m venv "$target"
    cp requirements/trainer.txt "$constraints"
    torch=${TORCH:-$(grep '^torch==' requirements/trainer.txt)}
    "$target/bin/python" -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
fi
# Older releases of pip overlook the extra by which math-verify and Hydra agree.
"$target/bin/python" -m pip install --no-cache-dir --upgrade "pip>=25"
"$target/bin/python" -m pip install --no-cache-dir --constraint "$constraints" .
"$target/bin/python" -m pip check ||
    echo "pip check: see above; in an image with packages of its own some of these are not ours"
