#!/usr/bin/env bash
# A small real Slurm on this machine: one controller and two emulated nodes, n1 and n2, of two CPUs each.
#
#   tools/slurm_local.sh start           installs what is missing, writes a configuration, starts the daemons
#   tools/slurm_local.sh run COMMAND...  the same, runs the command against it, and stops what it has started
#   tools/slurm_local.sh stop            stops what it has started
#
# Everything but the packages is in FOLDER (build/slurm); clients find it by SLURM_CONF, which `run` sets. A Slurm that is
# there already is left alone, and used by `run`. For tests: the daemons run as this user, and jobs are not contained.
set -euo pipefail
cd "$(dirname "$0")/.."

FOLDER=${SLURM_LOCAL_DIR:-$PWD/build/slurm}
PACKAGES="slurm-wlm munge"
PROGRAMS="slurmctld slurmd sbatch munged"
export PATH="$PATH:/usr/sbin:/sbin"

say() { echo "slurm_local: $*" >&2; }
die() { say "$*"; exit 1; }
answers() { sinfo --noheader >/dev/null 2>&1; }

missing() { for program in $PROGRAMS; do command -v "$program" >/dev/null || echo "$program"; done; }

install() {
    local lacking
    lacking=$(missing | xargs)
    [ -n "$lacking" ] || return 0
    command -v apt-get >/dev/null || die "not here: $lacking. Install Slurm and munge; there is no apt-get to do it with"
    [ "$(id -u)" = 0 ] || die "not here: $lacking. As root: apt-get install --no-install-recommends $PACKAGES"
    say "installing $PACKAGES (apt-get; log: $FOLDER/install.log)"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $PACKAGES; } \
        >"$FOLDER/install.log" 2>&1 || { tail -n 5 "$FOLDER/install.log" >&2; die "apt-get failed"; }
}

configure() {
    rm -rf "$FOLDER"/{state,spool.n1,spool.n2,log} # jobs of an earlier start
    mkdir -p "$FOLDER"/{state,spool.n1,spool.n2,log,run}
    chmod 700 "$FOLDER/run"
    [ -e "$FOLDER/run/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$FOLDER/run/munge.key")
    local host user
    host=$(hostname)
    user=$(id -un)
    # cred_expire: a requeued job waits for that long, 120 s by default, before it may start again.
    cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_LOCAL_PORT:-16817}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$FOLDER/run/munge.socket,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmdPidFile=$FOLDER/run/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    mkdir -p "$FOLDER"
    if answers; then
        say "a Slurm answers here already; it is used as it is"
        return 0
    fi
    say "starting Slurm on this machine: munged, slurmctld, and slurmd for two emulated nodes; all files in $FOLDER"
    install
    configure
    export SLURM_CONF=$FOLDER/slurm.conf
    munged --force --key-file="$FOLDER/run/munge.key" --socket="$FOLDER/run/munge.socket" \
        --pid-file="$FOLDER/run/munged.pid" --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/run/munged.seed"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N n1
    slurmd -f "$SLURM_CONF" -N n2
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --Node --states=idle --responding --format=%N 2>/dev/null | wc -l)" -ge 2 ]; then
            say "two idle nodes; export SLURM_CONF=$SLURM_CONF"
            return 0
        fi
        sleep 0.5
    done
    tail -n 5 "$FOLDER"/log/*.log >&2
    die "the nodes did not come up within 30 s"
}

stop() {
    if [ -e "$FOLDER/run/slurmctld.pid" ] && answers; then
        scancel --user="$(id -un)"
        for _ in $(seq 100); do [ -n "$(squeue --noheader)" ] || break; sleep 0.1; done
    fi
    for daemon in slurmd.n1 slurmd.n2 slurmctld munged; do
        local file=$FOLDER/run/$daemon.pid pid
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # A number may have gone to another process since.
        if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${daemon%.n?}" ]; then kill "$pid"; fi
        for _ in $(seq 50); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
        rm -f "$file"
    done
    rm -f "$FOLDER"/run/munge.socket*
}

case "${1:-}" in
start) start ;;
stop) export SLURM_CONF=$FOLDER/slurm.conf; stop ;;
run)
    shift
    [ $# -gt 0 ] || die "run: which command?"
    if ! SLURM_CONF=${SLURM_CONF:-} answers; then
        trap stop EXIT
        start
        export SLURM_CONF=$FOLDER/slurm.conf
    else
        say "a Slurm answers here already; it is used as it is"
    fi
    "$@"
    ;;
*) die "usage: $0 start | stop | run COMMAND..." ;;
esac
