# shellcheck shell=bash
# What the batch scripts share. They call, with bash -euo pipefail and the code as working directory:
#
#   begin_job SCRIPT ARGUMENTS...      check slurm/env.sh, find this job's nodes and directories; outside a job: submit
#                                      SCRIPT
#   run_training MODEL OVERRIDES...    rollout servers and training, to the end or to a requeue
#   run_evaluation MODEL OVERRIDES...  rollout servers and `dasd evaluate` on one node
#   run_alone NAME COMMAND...          one command on the first node
#
# With DRY_RUN=1 every command is printed and none is run: no cluster is needed, and no Slurm. A part of the job is one
# srun step in the background, so that the batch shell, which alone gets the signals of `#SBATCH --signal=B:`, can wait
# and act on them.

# shellcheck source=slurm/checks.sh
source slurm/checks.sh
[[ -f ${DASD_ENV:-slurm/env.sh} ]] || fail "DASD_ENV=$(shown "${DASD_ENV-}"): no such file"
# shellcheck source=slurm/env.sh
source "${DASD_ENV:-slurm/env.sh}"

EX_TEMPFAIL=75   # `dasd train` has saved and wants to be started again
SIGNALS=0        # how many have asked this job to stop
TRAIN_PID=
KEEPERS=()       # process ids of the subshells that keep servers up

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

dry() { [[ ${DRY_RUN:-0} != 0 ]]; }

# The value of an option in the #SBATCH lines of the script.
sbatch_value() { sed -n "s/^#SBATCH --$1=//p" "$DASD_SCRIPT" | head -n 1; }

# --- settings ---------------------------------------------------------------------------------------------------------

begin_job() {
    DASD_SCRIPT=$1
    shift
    JOB_ID=${SLURM_JOB_ID:-0}
    RESTARTS=${SLURM_RESTART_COUNT:-0}
    check_settings
    RUN_DIR=${DASD_RUN_DIR:-$DASD_RUNS/$(sbatch_value job-name)-$JOB_ID}
    LOG_DIR=$RUN_DIR/logs
    choose_programs
    submit_unless_in_job "$@"
    find_nodes
    if dry; then return; fi
    command -v curl > /dev/null || fail "curl is not there, and the readiness of servers is asked with it"
    [[ $DASD_CONTAINER != none ]] || require "$DASD_PYTHON"
    mkdir -p "$(dirname "$RUN_DIR")"
    (umask 077 && mkdir -p "$LOG_DIR")
    # The servers listen on the network. Whoever has no key learns nothing from them.
    if [[ -z ${DASD_API_KEY+set} ]]; then DASD_API_KEY=$(head -c 32 /dev/urandom | base64 | tr -dc 'A-Za-z0-9'); fi
    if [[ -n $DASD_API_KEY ]]; then export DASD_API_KEY; else unset DASD_API_KEY; fi
    trap on_exit EXIT
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
}

require() {
    local path
    for path in "$@"; do
        [[ -e $path ]] || fail "$path is not there: make it, or set where it is in slurm/env.sh"
    done
}

check_settings() {
    : "${DASD_GPUS_PER_NODE:=$(sbatch_value gpus-per-node)}" "${DASD_GPUS_PER_NODE:=0}" "${DASD_ENGINE:=sglang}"
    : "${DASD_TRAIN_NODES:=1}" "${DASD_ROLLOUT_NODES:=0}" "${DASD_SERVER_TP:=1}"
    local name
    [[ $JOB_ID =~ ^[0-9]+$ ]] || fail "SLURM_JOB_ID=$(shown "$JOB_ID") is no number of a job"
    whole_number RESTARTS 0 999999999
    for name in DASD_ROOT DASD_MODELS DASD_MODEL DASD_DATA DASD_RUNS DASD_RUN_DIR DASD_TRAIN_DATA DASD_HELDOUT_DATA \
        DASD_PYTHON DASD_SGLANG_PYTHON; do
        plain_path "$name"
    done
    one_line DASD_IMAGE
    one_line DASD_MOUNTS
    plain_words DASD_SERVER_ARGS
    if [[ -n ${DASD_API_KEY-} ]]; then plain_key DASD_API_KEY; fi
    one_of DASD_CONTAINER none pyxis apptainer
    one_of DASD_PLACEMENT disaggregated colocated
    one_of DASD_ENGINE sglang embedded
    one_of DASD_ROUTER 0 1
    share DASD_COLOCATED_MEMORY
    whole_number DASD_TRAIN_NODES 1 9999
    whole_number DASD_ROLLOUT_NODES 0 9999
    whole_number DASD_GPUS_PER_NODE 0 64
    whole_number DASD_SERVER_TP 1 64
    whole_number DASD_GPU_MEMORY 1 9999
    : "${DASD_SERVERS_PER_NODE:=$((DASD_GPUS_PER_NODE / DASD_SERVER_TP))}"
    whole_number DASD_SERVERS_PER_NODE 0 64
    for name in DASD_SERVER_PORT DASD_ROUTER_PORT DASD_RENDEZVOUS_PORT; do whole_number "$name" 1 65535; done
    for name in DASD_READY_SECONDS DASD_SERVER_RESTARTS DASD_END_SECONDS; do whole_number "$name" 0 9999999; done
    if [[ $DASD_PLACEMENT == colocated ]]; then DASD_ROLLOUT_NODES=0; fi
    if ((DASD_GPUS_PER_NODE > 0 && DASD_SERVERS_PER_NODE * DASD_SERVER_TP > DASD_GPUS_PER_NODE)); then
        fail "$DASD_SERVERS_PER_NODE servers of DASD_SERVER_TP=$DASD_SERVER_TP GPUs do not fit on" \
            "DASD_GPUS_PER_NODE=$DASD_GPUS_PER_NODE"
    fi
    if ((DASD_SERVER_PORT + (DASD_TRAIN_NODES + DASD_ROLLOUT_NODES) * DASD_SERVERS_PER_NODE > 65536)); then
        fail "DASD_SERVER_PORT=$DASD_SERVER_PORT: the servers' ports, one after the other, would end above 65535"
    fi
}

# DASD: the command. CONTAINER: what stands between srun and a command.
choose_programs() {
    CONTAINER=()
    if [[ $DASD_CONTAINER == none ]]; then
        : "${DASD_PYTHON:=$DASD_ROOT/.venv/bin/python}" "${DASD_SGLANG_PYTHON:=$DASD_ROOT/.venv-sglang/bin/python}"
    else
        : "${DASD_PYTHON:=/opt/dasd/bin/python}" "${DASD_SGLANG_PYTHON:=/opt/sglang/bin/python}"
    fi
    DASD=("$DASD_PYTHON" -m dasd_megatron.cli)
    [[ $DASD_CONTAINER == none || -n $DASD_IMAGE ]] ||
        fail "DASD_CONTAINER=$DASD_CONTAINER needs DASD_IMAGE, in slurm/env.sh"
    add_mounts "$RUN_DIR" "${DASD_MODEL-}" "$DASD_TRAIN_DATA" "$DASD_HELDOUT_DATA"
    case $DASD_CONTAINER in
        pyxis)
            CONTAINER=(--container-image="$DASD_IMAGE" --container-mounts="$DASD_MOUNTS"
                --container-workdir="$DASD_ROOT" --no-container-mount-home) ;;
        apptainer)
            CONTAINER=(apptainer exec --nv --no-home --bind "$DASD_MOUNTS" --pwd "$DASD_ROOT" "$DASD_IMAGE")
            # There is no home to keep compiled kernels in, and only the mounts can be written to.
            export XDG_CACHE_HOME=$RUN_DIR/cache TRITON_CACHE_DIR=$RUN_DIR/cache/triton
            export FLASHINFER_WORKSPACE_BASE=$RUN_DIR/cache ;;
    esac
}

# What lies outside DASD_MOUNTS. The run directory is made before it is mounted; another path that is not there is
# complained about later.
add_mounts() {
    local path mount mounts inside
    for path in "$@"; do
        [[ $path == /* && ($path == "$RUN_DIR" || -e $path) ]] || continue
        inside=
        IFS=, read -ra mounts <<< "$DASD_MOUNTS"
        for mount in "${mounts[@]}"; do if [[ $path/ == "${mount%%:*}"/* ]]; then inside=1; fi; done
        [[ -n $inside ]] || DASD_MOUNTS+=,$path:$path
    done
}

# GPUs of one server, a power of two, whose weights leave room for sequences. DASD_GPU_MEMORY and DASD_GPUS_PER_NODE are
# checked before.
gpus_for() {
    local gpus=1 size=0 file
    for file in "$1"/*.safetensors; do
        if [[ -e $file ]]; then size=$((size + $(stat -Lc %s -- "$file"))); fi
    done
    while ((size > gpus * DASD_GPU_MEMORY * 600000000 && 2 * gpus <= DASD_GPUS_PER_NODE)); do gpus=$((2 * gpus)); done
    printf '%s' "$gpus"
}

# Outside a job: submit the script itself, with the account and partition of slurm/env.sh and as many nodes as its
# layout has.
submit_unless_in_job() {
    local command=(sbatch --nodes=$((DASD_TRAIN_NODES + DASD_ROLLOUT_NODES)) "$DASD_SCRIPT" "$@")
    [[ -z ${SLURM_JOB_ID-} ]] || return 0
    if ! dry; then exec "${command[@]}"; fi
    say "to submit:"
    show "${command[@]}"
}

# NODES: the names of the job's nodes, in Slurm's order. Made up where there is no job.
find_nodes() {
    local needed=$((DASD_TRAIN_NODES + DASD_ROLLOUT_NODES)) index name
    NODES=()
    if [[ -n ${SLURM_JOB_NODELIST-} ]]; then
        mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    else
        for ((index = 1; index <= needed; index++)); do NODES+=("$(printf 'node%02d' "$index")"); done
    fi
    if ((${#NODES[@]} != needed)); then
        fail "the job has ${#NODES[@]} nodes, and DASD_TRAIN_NODES=$DASD_TRAIN_NODES with" \
            "DASD_ROLLOUT_NODES=$DASD_ROLLOUT_NODES needs $needed: sbatch --nodes=$needed $DASD_SCRIPT"
    fi
    for name in "${NODES[@]}"; do
        [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "Slurm names a node $(shown "$name"), which is no host name"
    done
    TRAIN=("${NODES[@]:0:DASD_TRAIN_NODES}")
    if [[ $DASD_PLACEMENT == colocated ]]; then SERVE=("${TRAIN[@]}"); else SERVE=("${NODES[@]:DASD_TRAIN_NODES}"); fi
}

# --- steps ------------------------------------------------------------------------------------------------------------

joined() {
    local IFS=,
    printf '%s' "$*"
}

show() {
    printf '   '
    printf ' %q' "$@"
    printf '\n'
}

# STEP: the srun command that runs COMMAND once on each of NODES (comma-separated), with the log LOG. Every step sees
# the whole node, since servers and trainers may share one; --wait ends the other nodes' tasks some time after the first
# has ended, but lets them save before.
make_step() {
    local nodes=$1 log=$2 names count
    shift 2
    IFS=, read -ra names <<< "$nodes"
    count=${#names[@]}
    STEP=(srun --overlap --mem=0 --cpu-bind=none --nodes="$count" --ntasks="$count" --ntasks-per-node=1
        --nodelist="$nodes" --kill-on-bad-exit=0 --wait="$DASD_END_SECONDS" --open-mode=append --output="$log"
        "${CONTAINER[@]}" "$@")
}

# Run the rest of the line in the background and start it again when it ends, until it has done so DASD_SERVER_RESTARTS
# times in a row within ten minutes of its start, or the subshell gets SIGTERM. The trainer goes on with the other
# servers, and gives the new one its weights.
keep() {
    local name=$1
    shift
    say "$name:"
    show "$@"
    if dry; then return; fi
    (
        set +e
        ending=0
        child=
        trap 'ending=1; [[ -z $child ]] || kill -TERM "$child" 2> /dev/null' TERM
        trap '' USR1
        for ((try = 0; try <= DASD_SERVER_RESTARTS && !ending; try++)); do
            if ((try > 0)); then
                say "$name ended with status $status; started again ($try of $DASD_SERVER_RESTARTS), its log is in" \
                    "$LOG_DIR"
                sleep $((try < 6 ? try : 30)) &
                child=$!
                wait "$child"
                ((!ending)) || break
            fi
            began=$SECONDS
            "$@" < /dev/null &
            child=$!
            wait "$child"
            status=$?
            ((SECONDS - began < 600)) || try=0
            # A trap cuts the first wait short.
            if ((ending)); then wait "$child"; fi
        done
        ((ending)) || say "$name ended $try times in a row and stays down"
    ) &
    KEEPERS+=("$!")
}

end_servers() {
    local pid deadline=$((SECONDS + 20))
    for pid in "${KEEPERS[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
    for pid in "${KEEPERS[@]}"; do
        while kill -0 "$pid" 2> /dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    done
    KEEPERS=()
}

# --- rollout servers --------------------------------------------------------------------------------------------------

# True where servers and trainers give the GPUs' memory to one another.
hands_over_memory() {
    [[ $DASD_PLACEMENT == colocated && $DASD_ENGINE == sglang && $DASD_ROUTER == 0 ]]
}

# Start all servers on SERVE; URLS: their addresses.
start_servers() {
    local model=$1 index=0 node slot port devices command host=0.0.0.0 extra=()
    read -ra extra <<< "$DASD_SERVER_ARGS"
    if [[ ${#SERVE[@]} -eq 1 && ${#TRAIN[@]} -eq 1 && ${SERVE[0]} == "${TRAIN[0]}" ]]; then
        host=127.0.0.1
    fi
    if hands_over_memory; then
        extra+=(--enable-memory-saver --mem-fraction-static "${DASD_COLOCATED_MEMORY:-0.75}")
    elif [[ $DASD_PLACEMENT == colocated && $DASD_ENGINE == sglang ]]; then
        extra+=(--mem-fraction-static "${DASD_COLOCATED_MEMORY:-0.4}")
    fi
    URLS=()
    for node in "${SERVE[@]}"; do
        for ((slot = 0; slot < DASD_SERVERS_PER_NODE; slot++)); do
            port=$((DASD_SERVER_PORT + index))
            command=()
            if ((DASD_GPUS_PER_NODE > 0)); then
                devices=$(seq -s, $((slot * DASD_SERVER_TP)) $((slot * DASD_SERVER_TP + DASD_SERVER_TP - 1)))
                command=(env CUDA_VISIBLE_DEVICES="$devices")
            fi
            command+=("${DASD[@]}" serve --engine "$DASD_ENGINE" --model-path "$model" --host "$host" --port "$port")
            if [[ $DASD_ENGINE == sglang ]]; then
                command+=(--python "$DASD_SGLANG_PYTHON" --tp-size "$DASD_SERVER_TP"
                    --startup-timeout "$DASD_READY_SECONDS")
                if ((${#extra[@]})); then command+=(-- "${extra[@]}"); fi
            fi
            make_step "$node" "$LOG_DIR/server.$index.%N.log" "${command[@]}"
            keep "server $index on $node" "${STEP[@]}"
            if [[ $host == 127.0.0.1 ]]; then URLS+=("http://127.0.0.1:$port"); else URLS+=("http://$node:$port"); fi
            index=$((index + 1))
        done
    done
    ((index > 0)) ||
        fail "there is no rollout server: set DASD_ROLLOUT_NODES and DASD_SERVERS_PER_NODE, in slurm/env.sh"
}

start_router() {
    local node=${SERVE[0]}
    make_step "$node" "$LOG_DIR/router.%N.log" "${DASD[@]}" router --python "$DASD_SGLANG_PYTHON" \
        --servers "${URLS[@]}" --host 0.0.0.0 --port "$DASD_ROUTER_PORT"
    keep "router on $node" "${STEP[@]}"
    ROUTER_URL=http://$node:$DASD_ROUTER_PORT
}

answers() {
    # The key comes in on standard input: a command line is for everybody to see. A redirect is not followed.
    local header=
    if [[ -n ${DASD_API_KEY-} ]]; then header="Authorization: Bearer $DASD_API_KEY"; fi
    curl --header @- --silent --fail --noproxy '*' --max-time 10 --output /dev/null "$1" <<< "$header"
}

# Wait until each address answers. Ends the job at the deadline, and when no keeper is left.
wait_until_ready() {
    local url pid alive deadline=$((SECONDS + DASD_READY_SECONDS))
    say "waiting at most $DASD_READY_SECONDS s for $*"
    if dry; then return; fi
    for url in "$@"; do
        until answers "$url"; do
            ((!SIGNALS)) || return 0
            ((SECONDS < deadline)) ||
                fail "$url did not answer within DASD_READY_SECONDS=$DASD_READY_SECONDS; the logs are in $LOG_DIR"
            alive=0
            for pid in "${KEEPERS[@]}"; do if kill -0 "$pid" 2> /dev/null; then alive=1; fi; done
            ((alive)) || fail "every rollout server ended before it was ready; the logs are in $LOG_DIR"
            sleep 1 &
            wait $! || true
        done
    done
}

# --- training ---------------------------------------------------------------------------------------------------------

# To the trainers on all nodes, through their srun, which hands on SIGUSR1 but takes SIGTERM for its own.
on_signal() {
    SIGNALS=$((SIGNALS + 1))
    say "SIG$1: the run is to be saved"
    if [[ -n $TRAIN_PID ]]; then kill -USR1 "$TRAIN_PID" 2> /dev/null || true; fi
}

on_exit() {
    local status=$?
    trap '' USR1 TERM
    if [[ -n $TRAIN_PID ]] && kill -0 "$TRAIN_PID" 2> /dev/null; then kill -TERM "$TRAIN_PID"; fi
    end_servers
    exit "$status"
}

run_training() {
    local model=$1 overrides=() server=node
    shift
    dry || require "$model"
    print_layout "$model"
    overrides=("run.dir=$RUN_DIR" resume=auto rollout=external)
    if [[ $DASD_PLACEMENT == colocated ]]; then
        # They take turns on the GPUs, so nothing is sampled ahead.
        overrides+=(rollout.max_staleness=0)
        # Servers keep a part of each GPU, also when they have released their memory.
        if ((DASD_GPUS_PER_NODE > 0)); then overrides+=(precision.recompute=full); fi
        # Between machines weights go over the disk: NCCL takes no two processes on one GPU.
        local way=disk
        if hands_over_memory; then
            overrides+=(rollout.release_memory=true backend.offload=all)
            if ((${#TRAIN[@]} == 1)); then
                server=127.0.0.1
                way=tensor
            fi
        fi
        overrides+=("rollout.weight_sync=$way")
    fi
    check_run "${overrides[@]}" "rollout.servers=[http://$server:30000]" "$@"
    start_servers "$model"
    if ((DASD_ROUTER)); then
        start_router
        overrides+=('rollout.servers=[]' "rollout.router=$ROUTER_URL")
    else
        overrides+=("rollout.servers=[$(joined "${URLS[@]}")]")
    fi
    wait_until_ready "${URLS[@]/%//health}"
    if ((DASD_ROUTER)); then wait_until_ready "$ROUTER_URL/readiness"; fi
    local status=$EX_TEMPFAIL
    if ((!SIGNALS)); then
        train "${overrides[@]}" "$@"
    fi
    if dry; then
        say "SIGUSR1 or SIGTERM: handed to the trainers, which save and end with status $EX_TEMPFAIL; then:"
        show scontrol requeue "$JOB_ID"
        return
    fi
    say "training ended with status $status"
    trap '' USR1
    trap - TERM
    end_servers
    end_job "$status"
}

print_layout() {
    say "job $JOB_ID, start $((RESTARTS + 1)), $DASD_PLACEMENT, container $DASD_CONTAINER; model $1"
    say "training on ${#TRAIN[@]} nodes: ${TRAIN[*]}"
    say "rollouts on ${#SERVE[@]} nodes: ${SERVE[*]-}; on each $DASD_SERVERS_PER_NODE servers, of $DASD_SERVER_TP of" \
        "$DASD_GPUS_PER_NODE GPUs"
    say "run directory $RUN_DIR; the logs of all parts are in $LOG_DIR"
}

# What is wrong with the configuration or the layout is known before servers load for half an hour. A requeued job has
# been through it.
check_run() {
    local setting log=$LOG_DIR/check.log command=("${DASD[@]}" train --dry-run --nodes "${#TRAIN[@]}")
    local -A data=()
    command+=(--gpu-memory "$DASD_GPU_MEMORY")
    if ((DASD_GPUS_PER_NODE > 0)); then command+=(--gpus-per-node "$DASD_GPUS_PER_NODE"); fi
    make_step "${TRAIN[0]}" "$log" "${command[@]}" "$@"
    say "checking the configuration:"
    show "${STEP[@]}"
    if dry || ((RESTARTS > 0)); then return; fi
    for setting in "$@"; do
        case $setting in data.train.path=* | data.heldout.path=*) data[${setting%%=*}]=${setting#*=} ;; esac
    done
    for setting in "${data[@]}"; do [[ $setting == null ]] || require "$setting"; done
    "${STEP[@]}" < /dev/null || fail "the run cannot be started: $(tail -n 1 "$log")"
    grep '^ *note: ' "$log" || true
}

# One `dasd train` a node, and wait for all; its status goes to `status`.
train() {
    local nodes seen launcher
    nodes=$(joined "${TRAIN[@]}")
    # torchrun's variables. Slurm numbers the step's nodes; the first one's name is the meeting point. Enroot's hook for
    # PyTorch images sets those of a single rank, and each node is to start several.
    # shellcheck disable=SC2016
    launcher=(env -u RANK -u LOCAL_RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT PET_NNODES="${#TRAIN[@]}"
        PET_RDZV_ENDPOINT="${TRAIN[0]}:$DASD_RENDEZVOUS_PORT" PET_RDZV_ID="$JOB_ID-$RESTARTS"
        PET_LOG_DIR="$LOG_DIR/ranks"
        bash -c 'PET_NODE_RANK=$SLURM_NODEID PET_LOG_DIR=$PET_LOG_DIR/node$SLURM_NODEID exec "$@"' dasd-train)
    make_step "$nodes" "$LOG_DIR/train.%n.%N.log" "${launcher[@]}" "${DASD[@]}" train "$@"
    say "training:"
    show "${STEP[@]}"
    if dry; then return; fi
    "${STEP[@]}" < /dev/null &
    TRAIN_PID=$!
    # Between the last look and now.
    if ((SIGNALS)); then kill -USR1 "$TRAIN_PID" 2> /dev/null || true; fi
    while :; do
        seen=$SIGNALS
        if wait "$TRAIN_PID"; then status=0; else status=$?; fi
        # A signal ends the wait before the step has ended.
        ((seen != SIGNALS)) || break
    done
    TRAIN_PID=
}

# 0: done. Saved, or asked to stop: again, unless Slurm is already ending the job (scancel, or a requeue of its own).
# Else: failed.
end_job() {
    local status=$1 state try
    if ((status == 0)); then
        exit 0
    elif ((status != EX_TEMPFAIL && !SIGNALS)); then
        say "training failed; the end of the first node's log:"
        tail -n 20 "$LOG_DIR"/train.0.*.log || true
        exit "$status"
    fi
    # Slurm's controller is busy when many jobs are pre-empted at once.
    for ((try = 1; ; try++)); do
        if state=$(squeue --noheader --jobs="$JOB_ID" --format=%T); then
            if [[ $state != RUNNING ]]; then
                say "the job is $state: not requeued"
                exit "$status"
            fi
        fi
        say "requeued; it goes on from its last checkpoint"
        if scontrol requeue "$JOB_ID"; then break; fi
        ((try < 12)) || fail "Slurm did not requeue the job: scontrol requeue $JOB_ID"
        say "Slurm did not answer: again in 10 s"
        sleep 10 &
        wait $! || true
    done
    # Slurm ends this shell. A status of 0 would count as completed.
    sleep 60 &
    wait $! || true
    exit "$status"
}

# --- one-node jobs ----------------------------------------------------------------------------------------------------

run_evaluation() {
    local model=$1
    shift
    dry || require "$model"
    SERVE=("${TRAIN[@]}")
    print_layout "$model"
    start_servers "$model"
    wait_until_ready "${URLS[@]/%//health}"
    make_step "${TRAIN[0]}" "$LOG_DIR/evaluate.%N.log" "${DASD[@]}" evaluate model=hf model.path="$model" \
        run.dir="$RUN_DIR" rollout=external rollout.servers="[$(joined "${URLS[@]}")]" \
        data.train.path="$DASD_HELDOUT_DATA" data.heldout.path="$DASD_HELDOUT_DATA" "$@"
    run_step evaluation
}

run_alone() {
    local name=$1
    shift
    make_step "${TRAIN[0]}" "$LOG_DIR/$name.%N.log" "$@"
    run_step "$name"
}

run_step() {
    say "$1, log in $LOG_DIR:"
    show "${STEP[@]}"
    if dry; then return; fi
    "${STEP[@]}" < /dev/null
}
