# shellcheck shell=bash
# The one file to edit. The scripts in this directory read it in the job; a variable that is set already, as in
# `DASD_ROLLOUT_NODES=3 sbatch ...`, goes before what stands here.

# Slurm's own variables, which `bash slurm/train_dasd_32b.sh` hands to sbatch, and `source slurm/env.sh` to your shell's
# sbatch.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_CONSTRAINT=h100

# Paths that all nodes see. The code is the directory that sbatch is called in.
: "${DASD_ROOT:=$PWD}"
: "${DASD_MODELS:=$DASD_ROOT/models}"            # Hugging Face directories; DASD_MODEL names one
: "${DASD_DATA:=$DASD_ROOT/data}"
: "${DASD_RUNS:=$DASD_ROOT/runs}"                # each job trains in DASD_RUNS/<name>-<job id>
: "${DASD_TRAIN_DATA:=$DASD_DATA/train.jsonl}"
: "${DASD_HELDOUT_DATA:=$DASD_DATA/heldout.jsonl}"

# Containers: none (the environments that make has built), pyxis (Enroot) or apptainer. Paths are the same inside.
: "${DASD_CONTAINER:=none}"
: "${DASD_IMAGE:=}"                              # pyxis: registry#name:tag or a .sqsh file; apptainer: a .sif file
: "${DASD_MOUNTS:=$DASD_ROOT:$DASD_ROOT,$DASD_MODELS:$DASD_MODELS,$DASD_DATA:$DASD_DATA,$DASD_RUNS:$DASD_RUNS}"
: "${DASD_PYTHON:=}"                             # of the trainer; empty: .venv, in a container /opt/dasd
: "${DASD_SGLANG_PYTHON:=}"                      # of SGLang; empty: .venv-sglang, in a container /opt/sglang

# Layout. Empty: what the script says for its model.
: "${DASD_PLACEMENT:=disaggregated}"             # or colocated: servers on the training nodes' GPUs
: "${DASD_TRAIN_NODES:=}"
: "${DASD_ROLLOUT_NODES:=}"
: "${DASD_SERVERS_PER_NODE:=}"                   # empty: as many as fit, DASD_GPUS_PER_NODE / DASD_SERVER_TP
: "${DASD_SERVER_TP:=}"                          # GPUs of one server; empty in eval.sh: as few as hold the model well
: "${DASD_GPUS_PER_NODE:=}"
: "${DASD_GPU_MEMORY:=80}"                       # of one GPU, in GB; the layout is compared with it first
: "${DASD_ROUTER:=0}"                            # 1: sglang-router between trainer and servers
: "${DASD_COLOCATED_MEMORY:=}"                   # colocated: SGLang's share of a GPU's memory while it samples; empty:
                                                 # 0.75 where it hands it over to the trainer, else 0.4
: "${DASD_SERVER_ARGS:=}"                        # further arguments of sglang.launch_server, like --quantization fp8

# Network. DASD_API_KEY: empty for servers without a key; unset, every job makes one up.
: "${DASD_SERVER_PORT:=30000}"                   # of the first server; the others follow
: "${DASD_ROUTER_PORT:=31000}"
: "${DASD_RENDEZVOUS_PORT:=29500}"
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Patience.
: "${DASD_READY_SECONDS:=1800}"                  # for all servers to load their model
: "${DASD_SERVER_RESTARTS:=10}"                  # of each server, in a row, within ten minutes of its start
: "${DASD_END_SECONDS:=60}"                      # for the other nodes after the first one's training has ended
