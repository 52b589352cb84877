#!/usr/bin/env bash
# Avg@k, Pass@k and Maj@k of a Hugging Face directory on DASD_HELDOUT_DATA, or on evaluation.benchmarks=[...]: one node
# of rollout servers that `dasd evaluate` asks.
#   sbatch slurm/eval.sh MODEL_DIRECTORY [field=value ...]
#SBATCH --job-name=dasd_eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# In a job $0 is Slurm's copy of this file, and does not say where the code is.
cd "${DASD_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"
# shellcheck source=slurm/common.sh
source slurm/common.sh

[[ ${1-} && $1 != *=* ]] || fail "usage: sbatch slurm/eval.sh MODEL_DIRECTORY [field=value ...]"
# shellcheck disable=SC2034
DASD_TRAIN_NODES=1 DASD_ROLLOUT_NODES=0 DASD_PLACEMENT=disaggregated DASD_ROUTER=0 DASD_MODEL=$1
: "${DASD_GPUS_PER_NODE:=8}" "${DASD_EXPERIMENT:=dasd_7b}"
whole_number DASD_GPUS_PER_NODE 0 64
whole_number DASD_GPU_MEMORY 1 9999
plain_path DASD_EXPERIMENT
: "${DASD_SERVER_TP:=$(gpus_for "$1")}"
begin_job slurm/eval.sh "$@"
run_evaluation "$1" experiment="$DASD_EXPERIMENT" run.name=evaluation "${@:2}"
