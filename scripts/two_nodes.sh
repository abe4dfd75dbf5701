#!/usr/bin/env bash
# One training run on two nodes, started by mpirun and by srun, on one machine and as root: a node is a network
# (with its own address), a host name and a /tmp of its own, so that the processes find nothing in common but
# the run's folder and talk TCP. Checked: both give the bits of each other and, within rounding, the losses of
# one process; and after a killed process or a lost node the run ends and goes on with the same bits.
#
#   cargo build --release --workspace --features nitro/mpi
#   sudo scripts/two_nodes.sh target/release/nitro
#
# Debian's packages: openmpi-bin slurmctld slurmd slurm-client munge iproute2 python3.
set -euo pipefail
nitro=$(realpath "${1:?usage: two_nodes.sh NITRO, built with the cargo feature mpi}")
for tool in mpirun srun slurmctld slurmd munged ip unshare nsenter python3; do
    command -v "$tool" >/dev/null || { echo "two_nodes.sh: $tool is missing" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "two_nodes.sh: only root can make nodes" >&2; exit 1; }

dir=$(mktemp -d /var/tmp/two-nodes.XXXX)
net=10.97.0
cd "$dir"

down() {
    for node in 1 2; do
        ip netns pids "node$node" 2>/dev/null | xargs -r kill -9 || true
        ip netns del "node$node" 2>/dev/null || true
    done
    [ -f ctld.pid ] && kill "$(cat ctld.pid)"
    ip link del nodes0 2>/dev/null || true
    rm -rf "$dir"
}
trap down EXIT

inside() { # NODE COMMAND...: runs COMMAND on a node
    local pid
    pid=$(cat "$dir/node$1.pid")
    shift
    nsenter -t "$pid" --uts --net --mount "$@"
}

echo "== two nodes"
ip link add nodes0 type bridge
ip addr add "$net.1/24" dev nodes0
ip link set nodes0 up
for node in 1 2; do
    mkdir "tmp$node"
    ip netns add "node$node"
    ip link add "nodes$node" type veth peer name eth0 netns "node$node"
    ip link set "nodes$node" master nodes0 up
    ip -n "node$node" addr add "$net.1$node/24" dev eth0
    ip -n "node$node" link set eth0 up
    ip -n "node$node" link set lo up
    setsid ip netns exec "node$node" unshare --uts --mount sh -c "
        mount --bind '$dir/tmp$node' /tmp; hostname node$node
        mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
        echo \$\$ > '$dir/node$node.pid'; exec sleep infinity" </dev/null >/dev/null 2>&1 &
    disown
done
until [ -s node1.pid ] && [ -s node2.pid ]; do sleep 0.1; done

# mpirun reaches a node through this instead of ssh; nodes are named by address.
cat > agent <<EOF
#!/bin/sh
pid=\$(cat $dir/node\${1#$net.1}.pid); shift
exec nsenter -t \$pid --uts --net --mount sh -c "\$*"
EOF
chmod +x agent

train() { # DIR STEPS: the command line of a small run in f32
    echo "$nitro train run configs/miniature-autoencoder.yaml --quiet --dir $dir/$1 --export $dir/$1/export
        run.precision=f32 run.max_steps=$2 run.batch_size=4 run.warmup_steps=5 run.decay_steps=10
        run.save_every=10 run.log_every=1 run.sample_every=0
        task.image_size=32 task.crop_size=16 task.full_size_steps=5"
}
export RAYON_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_btl_tcp_if_include=$net.0/24 OMPI_MCA_oob_tcp_if_include=$net.0/24
by_mpirun="mpirun -n 2 --host $net.11,$net.12 --map-by ppr:1:node --bind-to none
    --mca plm_rsh_agent $dir/agent -x RAYON_NUM_THREADS"
by_srun="srun --mpi=pmix -N 2 --ntasks-per-node=1 --kill-on-bad-exit=1 -D $dir"

interrupted() { # COMMAND DIR WHAT: starts a run, lets WHAT happen in the middle, starts it again
    $1 >"$2.log" 2>&1 &
    local run=$!
    until [ -f "$2/checkpoints/step-00000060.safetensors" ]; do
        kill -0 $run 2>/dev/null || { cat "$2.log"; exit 1; }
        sleep 0.1
    done
    $3
    if wait $run; then echo "two_nodes.sh: the run was done before $3" >&2; exit 1; fi
    $1
}
kill_process() { pkill -9 -n -f "^$nitro train run"; }
lose_node() { # what the job runs there, all at once
    ip netns pids node2 | xargs -r ps -o pid=,comm= -p | awk '/orted|nitro/ { print $1 }' | xargs kill -9
}
same() { cmp "$1/checkpoints/step-00000200.safetensors" "$2/checkpoints/step-00000200.safetensors"; }

echo "== one process"
$(train one 200)
echo "== mpirun"
$by_mpirun $(train two 200)
python3 - <<EOF
import json
losses = [[json.loads(line)["loss"] for line in open(f"{run}/metrics.jsonl")] for run in ("one", "two")]
assert len(losses[0]) == len(losses[1]) == 200
worst = max(abs(a - b) / abs(a) for a, b in zip(*(run[:30] for run in losses)))
print(f"the first 30 losses differ from one process's by at most {worst:.1e} of themselves")
assert worst < 1e-4
EOF
echo "== mpirun, a node lost at step 60"
interrupted "$by_mpirun $(train lost 200)" lost lose_node
same two lost

echo "== srun"
pgrep -x munged >/dev/null || su -s /bin/sh munge -c 'mkdir -p /run/munge; munged --force' ||
    { echo "two_nodes.sh: munged does not start" >&2; exit 1; }
cat > slurm.conf <<EOF
ClusterName=two
SlurmctldHost=$(hostname)($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation=$dir/spool
SlurmctldPidFile=$dir/ctld.pid
SlurmctldLogFile=$dir/ctld.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
NodeName=node1 NodeAddr=$net.11 CPUs=$(nproc) State=UNKNOWN
NodeName=node2 NodeAddr=$net.12 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES State=UP
EOF
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nIgnoreSystemd=yes\n' > cgroup.conf
mkdir spool
export SLURM_CONF=$dir/slurm.conf
slurmctld -c -f "$dir/slurm.conf"
for node in 1 2; do inside $node slurmd -f "$dir/slurm.conf" -N "node$node"; done
until [ "$(sinfo -h -t idle -o %D)" = 2 ]; do sleep 0.5; done
$by_srun $(train slurm 200)
same two slurm
echo "== srun, a process killed at step 60"
interrupted "$by_srun $(train killed 200)" killed kill_process
same two killed
echo "all as it should be"
