#!/usr/bin/env bash
# `dasd convert` on a node without GPUs: one tensor at a time, so its memory is that of the largest one.
#   sbatch slurm/convert.sh hf-to-megatron --hf-path DIR --output OUT --verify
#   sbatch slurm/convert.sh megatron-to-hf ...
#SBATCH --job-name=dasd_convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# In a job $0 is Slurm's copy of this file, and does not say where the code is.
cd "${DASD_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"
# shellcheck source=slurm/common.sh
source slurm/common.sh

[[ ${1-} ]] || fail "usage: sbatch slurm/convert.sh hf-to-megatron | megatron-to-hf | gguf-to-hf ..."
# shellcheck disable=SC2034
DASD_TRAIN_NODES=1 DASD_ROLLOUT_NODES=0 DASD_SERVERS_PER_NODE=0 DASD_PLACEMENT=disaggregated
begin_job slurm/convert.sh "$@"
run_alone convert "${DASD[@]}" convert "$@"
