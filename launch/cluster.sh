#!/usr/bin/env bash
# cluster.sh up N [RATE]      N hosts on this machine: qsr1, qsr2, ..., joined by a switch that holds every port to RATE
#                             in each direction (kbit, mbit or gbit: 100mbit, 1.5gbit); with sshd, and a hostfile
# cluster.sh run COMMAND ...  run a command on the first host; with QSR_HOST=2 before it, on the second
# cluster.sh down             kill what runs on the hosts, and remove them
#
# So that DeepSpeed's own launcher and torchrun meet several hosts and a slow network where there is neither:
#   launch/cluster.sh up 2 100mbit
#   DS_ACCELERATOR=cpu launch/cluster.sh run \
#     deepspeed --hostfile /run/qsr-cluster/hosts --module qsr_engine train RECIPE
#
# Needs root and Linux. sudo empties the path: write sudo env PATH="$PATH" launch/cluster.sh ...
# SLOTS=2 before `up` gives two ranks to a host. A host is a network namespace with a host name and an /etc/hosts of its
# own. Files, memory and cores are this machine's, so times show what a network costs, not what more machines bring.
# QSR_PREFIX=other before every command: another cluster beside the first, other1, other2, ..., in /run/other-cluster.
# It touches only what bears the prefix, the folder QSR_CLUSTER, and /run/sshd, without which sshd does not start.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

die() { echo "cluster.sh: $*" >&2; exit 1; }

prefix=${QSR_PREFIX:-qsr} # short, for interfaces' names; no digits, or eyes11 would be of eyes and of eyes1
[[ $prefix =~ ^[a-z]([a-z-]*[a-z])?$ && ${#prefix} -le 10 ]] ||
  die "found '$prefix' for QSR_PREFIX; write at most 10 of a-z and -, the first and the last one a letter"
state=$(realpath -m "${QSR_CLUSTER:-/run/$prefix-cluster}")
subnet=10.213.7 # none but the hosts see it, so it may be in use elsewhere, and by a second cluster
switch=${prefix}br
this="${QSR_CLUSTER:+QSR_CLUSTER=${state@Q} }$0" # how a user calls this script for this cluster
[ "$prefix" = qsr ] || this="QSR_PREFIX=$prefix $this"

check() {
  local program missing=()
  [ "$(id -u)" = 0 ] || die "network namespaces need root; found user $(id -u); write: sudo env PATH=\"\$PATH\" $this"
  for program in ip:iproute2 tc:iproute2 sshd:openssh-server ssh:openssh-client ssh-keygen:openssh-client pdsh:pdsh; do
    command -v "${program%:*}" >/dev/null || missing+=("${program%:*} (Debian: ${program#*:})")
  done
  [ ${#missing[@]} = 0 ] || die "these programs are missing: ${missing[*]}"
}

namespaces() { # the hosts', and the switch's
  ip netns list | sed -nE "s/^($prefix([0-9]+|br))( .*)?$/\1/p"
}

inside() { # inside HOST COMMAND ...: `ip netns exec` gives it mounts of its own, so this machine's /etc/hosts stays
  # shellcheck disable=SC2016 # the inner shell expands them
  exec ip netns exec "$prefix$1" unshare --uts \
    sh -c 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' - "$prefix$1" "$state/names" "${@:2}"
}

down() {
  local name pids
  set +e
  trap '' INT TERM HUP
  for name in $(namespaces); do
    for _ in {1..100}; do # a process may start another while this goes on
      pids=$(ip netns pids "$name")
      [ -n "$pids" ] || break
      # shellcheck disable=SC2086 # one word a process
      kill -KILL $pids
      sleep 0.02
    done 2>/dev/null
    ip netns del "$name" # with its interfaces
  done
  if [ -e "/run/sshd/$prefix" ]; then rm "/run/sshd/$prefix" && rmdir --ignore-fail-on-non-empty /run/sshd; fi
  if [ -e "$state/made_by_cluster_sh" ]; then rm -r "$state"; fi
}

files() { # files HOSTS: a throwaway key, for users and hosts; configurations, and lists of hosts
  ssh-keygen -q -t ed25519 -N '' -C "$prefix" -f "$state/key"
  printf '%s\n' "HostKey $state/key" "AuthorizedKeysFile $state/key.pub" "PasswordAuthentication no" "UsePAM no" \
    "StrictModes no" "PermitRootLogin prohibit-password" >"$state/sshd_config"
  printf '%s\n' "IdentityFile $state/key" "IdentitiesOnly yes" "BatchMode yes" "StrictHostKeyChecking no" \
    "UserKnownHostsFile /dev/null" "LogLevel ERROR" >"$state/ssh_config"
  install -D <(printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$(command -v ssh)" "$state/ssh_config") "$state/bin/ssh"
  seq -f "$prefix%g slots=${SLOTS:-1}" "$1" >"$state/hosts"
  { echo "127.0.0.1 localhost" && seq "$1" | sed "s/.*/$subnet.& $prefix&/"; } >"$state/names"
  # Where /run/sshd is empty it is the system's. Otherwise it holds a file for each cluster, and goes with the last one.
  [[ -d /run/sshd && -z $(ls /run/sshd) ]] || install -D /dev/null "/run/sshd/$prefix"
}

add_host() { # add_host NUMBER RATE: a namespace, a cable to port NUMBER of the switch, and sshd
  local name=$prefix$1 limit
  ip netns add "$name"
  ip -n "$switch" link add "port$1" type veth peer name eth0 netns "$name"
  ip -n "$switch" link set "port$1" master "$switch" up
  ip -n "$name" addr add "$subnet.$1/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" link set lo up
  if [ -n "$2" ]; then
    # 1 MB may pass at once, since such a cable hands over up to 64 kB; and 50 ms queue up, as in a switch.
    read -ra limit <<<"root tbf rate $2 burst 1mb latency 50ms"
    if ! tc -n "$switch" qdisc add dev "port$1" "${limit[@]}" || ! tc -n "$name" qdisc add dev eth0 "${limit[@]}"; then
      die "tc does not take '$2' as a rate; write for example 100mbit or 1gbit"
    fi
  fi
  (inside "$1" "$(command -v sshd)" -f "$state/sshd_config" -E "$state/sshd$1.log" -o "ListenAddress=$subnet.$1" \
    -o "PidFile=$state/sshd$1.pid") || die "sshd does not start: $(cat "$state/sshd$1.log")"
}

up() { # up HOSTS [RATE]
  local number
  [[ $1 =~ ^[1-9][0-9]{0,2}$ && $1 -le 250 ]] || die "found '$1' for the number of hosts; write one from 1 to 250"
  [[ ${SLOTS:-1} =~ ^[1-9][0-9]{0,2}$ ]] || die "found '$SLOTS' for SLOTS, ranks on a host; write one from 1 to 999"
  [[ $# = 1 || ($2 =~ ^[0-9]+(\.[0-9]+)?(k|m|g)bit$ && $2 =~ [1-9]) ]] ||
    die "found '$2' for the rate; write for example 100mbit or 1gbit"
  [[ -z $(namespaces) && ! -e $state ]] || die "$prefix... or $state is there; write first: $this down"
  mkdir "$state"
  trap down EXIT # a failure on the way, or a signal, leaves nothing behind
  trap 'exit 130' INT TERM HUP
  touch "$state/made_by_cluster_sh"
  files "$1"
  ip netns add "$switch" # a namespace for the switch, too: this machine's firewall does not see what it carries
  ip -n "$switch" link add "$switch" type bridge
  ip -n "$switch" link set "$switch" up
  for number in $(seq "$1"); do
    add_host "$number" "${2:-}"
  done
  (QSR_HOST=1 run pdsh -S -w "${prefix}[1-$1]" true) || die "no ssh to every host: $(tail -qn 2 "$state"/sshd*.log)"
  trap - EXIT INT TERM HUP
  echo "$1 hosts with links of ${2:-no set rate}; hostfile $state/hosts. To train on them, and to end them:"
  echo "  DS_ACCELERATOR=cpu $this run deepspeed --hostfile $state/hosts --module qsr_engine train RECIPE"
  echo "  $this down"
}

run() { # run COMMAND ...
  [ -e "/run/netns/$prefix${QSR_HOST:-1}" ] || die "there is no host $prefix${QSR_HOST:-1}; write first: $this up N"
  export PATH=$state/bin:$PATH PDSH_RCMD_TYPE=ssh GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
  # In place of .deepspeed_env: what DeepSpeed's launcher sets for the ranks, besides variables that begin with PYTHON.
  export DS_ENV_FILE=$state/env.$$
  env | grep -E '^(PATH|DS_ACCELERATOR|(QSR|GLOO|NCCL|OMP|TORCH)_[A-Z0-9_]+)=' >"$DS_ENV_FILE"
  inside "${QSR_HOST:-1}" "$@"
}

case "${1:-} $#" in
  "up 2" | "up 3") check && up "${@:2}" ;;
  "run "[2-9]* | "run 1"?*) check && run "${@:2}" ;;
  "down 1") check && down ;;
  *) die "found '$*'; write: up N [RATE], run COMMAND ..., or down" ;;
esac
