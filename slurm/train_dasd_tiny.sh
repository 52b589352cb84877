#!/usr/bin/env bash
# A rehearsal on the CPU in a minute or two: two nodes train a tiny model, a third one has two embedded rollout servers.
#   sbatch slurm/train_dasd_tiny.sh [field=value ...]
#SBATCH --job-name=dasd_tiny
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# In a job $0 is Slurm's copy of this file, and does not say where the code is.
cd "${DASD_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"
# shellcheck source=slurm/common.sh
source slurm/common.sh

: "${DASD_TRAIN_NODES:=2}" "${DASD_ROLLOUT_NODES:=1}" "${DASD_SERVERS_PER_NODE:=2}" "${DASD_ENGINE:=embedded}"
begin_job slurm/train_dasd_tiny.sh "$@"
: "${DASD_MODEL:=$RUN_DIR/tiny}"
if [[ ! -e $DASD_MODEL ]]; then
    make_model="from sys import argv; from dasd_megatron.config import load_config as load"
    make_model+="; from dasd_megatron.models.tiny import make_tiny_model as make"
    make_model+="; make(argv[1], load(['experiment=slurm_tiny']).model.tiny, seed=1)"
    run_alone model "$DASD_PYTHON" -c "$make_model" "$DASD_MODEL"
fi
run_training "$DASD_MODEL" experiment=slurm_tiny model.path="$DASD_MODEL" "$@"
