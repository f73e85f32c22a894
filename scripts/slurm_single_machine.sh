#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests: bash scripts/slurm_single_machine.sh install, or start|stop FOLDER
#
# As root, on Debian or Ubuntu, without systemd. It has an accounting database (slurmdbd on MariaDB): submitit asks sacct how a job ended,
# and waits for ever where there is none. Everything is kept in FOLDER and listens on the loopback only.
set -euo pipefail
action=${1:?install, start or stop}
folder=$(realpath -m "${2:-.}")
export SLURM_CONF=$folder/slurm.conf

stop() {
    for name in slurmd slurmctld slurmdbd mariadbd munged; do
        if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}

wait_for() {  # SECONDS COMMAND...
    local seconds=$1; shift
    for _ in $(seq $((seconds * 5))); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
    echo "not after $seconds s: $*" >&2
    exit 1
}

install_packages() {
    command -v slurmctld >/dev/null && command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "Slurm's daemons are missing (slurmctld, slurmd, slurmdbd, munge, mariadbd). This script installs them as root on Debian or Ubuntu." >&2
        exit 1
    fi
    apt-get update >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurm-wlm slurmctld slurmd munge slurmdbd mariadb-server >/dev/null
}

configure() {
    local host memory cores
    host=$(hostname -s)
    cores=$(nproc)
    [ "$cores" -ge 4 ] || cores=4  # jobs of tests wait more than they compute
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$folder"/{state,spool,database}
    cat > "$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.pid
CONF
    chmod 600 "$folder/slurmdbd.conf"
    cat > "$folder/slurm.conf" <<CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
JobAcctGatherType=jobacct_gather/linux
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
AuthInfo=cred_expire=20
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    install_packages
    configure
    [ -f /etc/munge/munge.key ] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key status=none; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
    if ! { munge -n | unmunge; } >/dev/null 2>&1; then  # Slurm's commands look for munge in its usual place
        mkdir -p /run/munge && chown munge: /run/munge && chmod 755 /run/munge
        runuser -u munge -- munged --force
        wait_for 10 sh -c 'munge -n | unmunge'
        cp /run/munge/munged.pid "$folder/munged.pid"
    fi
    export MYSQL_UNIX_PORT=$folder/database/socket
    [ -d "$folder/database/mysql" ] || mariadb-install-db --user=root --datadir="$folder/database" --auth-root-authentication-method=socket >/dev/null
    mariadbd --no-defaults --user=root --datadir="$folder/database" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --pid-file="$folder/mariadbd.pid" --log-error="$folder/mariadbd.log" >/dev/null 2>&1 &
    wait_for 30 mariadb --no-defaults --socket="$MYSQL_UNIX_PORT" -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db"
    SLURM_CONF=$folder/slurm.conf setsid slurmdbd -D >/dev/null 2>&1 < /dev/null &
    echo $! > "$folder/slurmdbd.pid"
    wait_for 30 sacctmgr -n show cluster
    sacctmgr -i add cluster single >/dev/null 2>&1 || true
    slurmctld -f "$folder/slurm.conf"
    slurmd -f "$folder/slurm.conf"
    wait_for 30 sh -c 'sinfo -h -o %T | grep -q idle'
    echo "Slurm is up. Set: export SLURM_CONF=$SLURM_CONF"
}

case $action in
    install) install_packages ;;
    start) start ;;
    stop) stop ;;
    *) echo "install, start or stop, not $action" >&2; exit 2 ;;
esac
