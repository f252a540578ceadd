#!/usr/bin/env bash
# A real SLURM of two nodes on the loopback of this machine, as root, for tests/test_slurm.py. Needs
# Debian's packages slurm-wlm and munge.
#   slurm_two_nodes.sh start | stop     (SLURM_CONF is printed; export it for sbatch, srun, scontrol)
#   SLURM_ROOT: where its files are; PROCTRACK: how it finds the processes of a job
readonly root=${SLURM_ROOT:-/tmp/megatron_rl_slurm} host=$(hostname -s)
set -euo pipefail
export SLURM_CONF=$root/slurm.conf

start() {
    mkdir -p "$root"/{state,log,spool.nodeA,spool.nodeB}
    cat >"$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=${PROCTRACK:-proctrack/linuxproc}
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
GresTypes=gpu
NodeName=nodeA NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=nodeB NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=nodeA,nodeB Default=YES MaxTime=INFINITE State=UP
CONF
    touch "$root"/gpu{0,1}  # GRES are files to slurmd: --gpus-per-node can be tried
    echo "Name=gpu File=$root/gpu[0-1]" >"$root/gres.conf"
    install -d -o munge -g munge -m 0755 /run/munge
    munge --no-input >/dev/null 2>&1 || su -s /bin/sh munge -c /usr/sbin/munged
    grep -q nodeA /etc/hosts || echo "127.0.0.1 nodeA nodeB" >>/etc/hosts  # MASTER_ADDR is a node's name
    slurmctld
    slurmd -N nodeA
    slurmd -N nodeB
    for _ in $(seq 50); do
        [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ] && break
        sleep 0.2
    done
    sinfo --Node --long
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local pid
    for pid in "$root"/*.pid /run/munge/munged.pid; do
        [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
    done
    while pgrep -x slurmctld || pgrep -x slurmd || pgrep -x munged; do sleep 0.2; done >/dev/null
}

"$1"
