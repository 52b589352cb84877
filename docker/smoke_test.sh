#!/usr/bin/env bash
# What `docker run IMAGE` does: what is installed (`dasd doctor`), and two steps of training on the CPU with the
# embedded server.
set -euo pipefail
python=${DASD_PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$python" -m dasd_megatron.cli doctor
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE "$python" -m dasd_megatron.cli train experiment=quickstart parallel=single \
    run.steps=2 warm_start.steps=0 evaluation=none batch.groups=4 run.dir="$work/run"
if [[ -n ${DASD_SGLANG_PYTHON:-} ]]; then
    "$DASD_SGLANG_PYTHON" -c 'import importlib.metadata as m; print("SGLang", m.version("sglang"))'
fi
echo "smoke test passed"
