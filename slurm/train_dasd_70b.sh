#!/usr/bin/env bash
# DASD on Llama 3.1 70B, eight nodes to train and four to serve; nodes of 8 GPUs of 80 GB. Set slurm/env.sh, then:
#   sbatch slurm/train_dasd_70b.sh [field=value ...]
#   DRY_RUN=1 bash slurm/train_dasd_70b.sh [field=value ...]    prints what it would do
#SBATCH --job-name=dasd_70b
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# In a job $0 is Slurm's copy of this file, and does not say where the code is.
cd "${DASD_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"
# shellcheck source=slurm/common.sh
source slurm/common.sh

: "${DASD_TRAIN_NODES:=8}" "${DASD_ROLLOUT_NODES:=4}" "${DASD_SERVER_TP:=8}"
: "${DASD_MODEL:=$DASD_MODELS/Llama-3.1-70B-Instruct}"
begin_job slurm/train_dasd_70b.sh "$@"
run_training "$DASD_MODEL" experiment=dasd_70b model.path="$DASD_MODEL" data.train.path="$DASD_TRAIN_DATA" \
    data.heldout.path="$DASD_HELDOUT_DATA" "$@"
