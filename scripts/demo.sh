#!/bin/sh
# The demonstration: a container that counts is checkpointed into containerd's content store, killed and removed,
# and counts on from there when it is restored. Exit status 0 only if it really does.
#
# It starts a containerd of its own, whose files and sockets lie in two new directories, so nothing on the
# machine is touched; on every way out the containers, the shims, cedanad, containerd, the mounts and the
# directories are gone again.
#
#   RUNTIME=io.containerd.runc.v2   another shim, to compare
#   CONTAINERD_DIR=DIR              another containerd: DIR holds containerd and ctr
#   SNAPSHOTTER=native              another snapshotter than overlayfs
set -eu

repository=$(cd "$(dirname "$0")/.." && pwd)
runtime=${RUNTIME:-io.containerd.cedana.v2}
image=cedana.local/busybox:latest
checkpoint=cedana.local/checkpoint:latest
# shellcheck disable=SC2016 # the container's shell expands it
counter='i=0; while :; do echo "count $i"; i=$((i+1)); sleep 0.5; done'

die() { printf '%s\n' "demo: $*" >&2; exit 1; }
step() { printf '\n%s\n' "$*"; }
show() { sed 's/^/    /'; }
# The moment in seconds with milliseconds, as an integer of milliseconds.
now_ms() { echo $(($(date +%s%N) / 1000000)); }

# Calls a command until it succeeds: wait_for SECONDS COMMAND...
wait_for() {
  tries=$(($1 * 20))
  shift
  while ! "$@" 2>/dev/null; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    sleep 0.05
  done
}

[ "$(id -u)" = 0 ] || die "needs root: sudo $0"
PATH=$repository/bin:${CONTAINERD_DIR:+$CONTAINERD_DIR:}$PATH
export PATH
for tool in containerd ctr runc criu; do
  command -v "$tool" >/dev/null || die "$tool is missing: run ./run setup"
done
if [ "$runtime" = io.containerd.cedana.v2 ]; then
  command -v containerd-shim-cedana-v2 >/dev/null || die "containerd-shim-cedana-v2 is not built: run npm run build"
fi

# --- two directories: sockets want a short path (108 bytes), snapshots a file system that may run programs ---
run=$(mktemp -d /run/cedana-demo.XXXXXX)
data=$(mktemp -d /var/tmp/cedana-demo.XXXXXX)
namespace=${run##*/}                # also the name of our cgroup and of runc's directory
socket=$run/c.sock
log=$data/containerd.log
export CEDANA_RUN_DIR="$run/cedana" CEDANA_STATE_DIR="$data/cedana"
containerd_pid='' attach_pid=''

# ctr as every step below uses it. Not `exec`: traps must survive.
c() { ctr --connect-timeout 3s --address "$socket" --namespace "$namespace" "$@"; }

# A child that has ended but was not waited for still answers kill -0.
alive() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.Z' "/proc/$1/status"; }
gone() { ! alive "$1"; }

# Ends a process that we started, first kindly.
stop() {
  alive "$1" || return 0
  kill -TERM "$1" 2>/dev/null || :
  wait_for 5 gone "$1" || kill -KILL "$1" 2>/dev/null || :
  wait "$1" 2>/dev/null || :
}

# Pids of processes with one of our two directories in their command line: shims, keepers, runc, criu.
ours() {
  for cmdline in /proc/[0-9]*/cmdline; do
    pid=${cmdline#/proc/} pid=${pid%/cmdline}
    [ "$pid" != "$$" ] || continue
    if grep -qsaF -e "$run" -e "$data" "$cmdline"; then echo "$pid"; fi
  done
}

# Runs find in our namespace's cgroups: one with v2, one per hierarchy with v1.
in_cgroups() {
  find /sys/fs/cgroup -maxdepth 2 -type d -name "$namespace" 2>/dev/null | while read -r cgroup; do
    find "$cgroup" -depth "$@" 2>/dev/null
  done
}
# A cgroup can go when its last process has been reaped.
cgroups_removed() {
  in_cgroups -type d -exec rmdir {} \;
  [ -z "$(in_cgroups)" ]
}

has_task() { c task ls -q 2>/dev/null | grep -qx "$1"; }
# The kill is asynchronous, so the first try may come too early; and who is attached removes the task, too.
task_removed() { c task rm "$1" >/dev/null 2>&1 || ! has_task "$1"; }
remove_container() {   # remove_container ID: whatever state it is in, or not there
  if has_task "$1"; then
    c task kill --signal KILL "$1" >/dev/null 2>&1 || :
    wait_for 5 task_removed "$1" || :
  fi
  c container rm "$1" >/dev/null 2>&1 || :
}

cleanup() {
  status=$?
  trap '' INT TERM HUP   # nothing may interrupt the tidying
  set +e
  if [ -n "$containerd_pid" ] && alive "$containerd_pid"; then
    remove_container counter
    remove_container restored
    # containerd that goes away in the middle of a removal leaves mounts behind: images first, then containerd.
    c images rm --sync "$checkpoint" "$image" >/dev/null 2>&1
  fi
  [ -z "$attach_pid" ] || stop "$attach_pid"
  if [ "$status" -gt 0 ] && [ "$status" -lt 128 ] && grep -qv level=info "$log" 2>/dev/null; then
    printf '\ndemo: the last lines of containerd:\n' >&2
    grep -v level=info "$log" | tail -n 25 >&2
  fi
  [ -z "$containerd_pid" ] || stop "$containerd_pid"
  # Shims and containers that are still there, because containerd died or would not; before cedanad, which a
  # keeper would start again.
  for pid in $(ours) $(in_cgroups -name cgroup.procs -exec cat {} +); do kill -KILL "$pid" 2>/dev/null; done
  # Frozen by an interrupted checkpoint, they would not die (cgroup v1).
  in_cgroups -name freezer.state | while read -r state; do echo THAWED >"$state"; done
  if [ -s "$CEDANA_RUN_DIR/cedanad.pid" ]; then stop "$(cat "$CEDANA_RUN_DIR/cedanad.pid")"; fi
  # Newest mounts first; mountinfo writes no space into these names.
  awk -v run="$run/" -v data="$data/" 'index($5, run) == 1 || index($5, data) == 1 { print $5 }' /proc/self/mountinfo |
    tac | while read -r mount_point; do umount --lazy "$mount_point"; done
  wait_for 3 cgroups_removed
  rm -rf "/run/containerd/runc/$namespace" "/run/runc/$namespace"
  rm -rf --one-file-system "$run" "$data"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

last_number() { sed -n 's/^count \([0-9][0-9]*\)$/\1/p' "$1" 2>/dev/null | tail -n 1; }
first_number() { sed -n 's/^count \([0-9][0-9]*\)$/\1/p' "$1" 2>/dev/null | head -n 1; }
numbers() { grep -c '^count [0-9][0-9]*$' "$1" 2>/dev/null || :; }
has_numbers() { [ "$(numbers "$1")" -ge "$2" ]; }   # has_numbers FILE COUNT

# --- a containerd of our own ---
step "Starting a private containerd ($(containerd --version | awk '{ print $3 }'))"
cat >"$run/config.toml" <<TOML
version = 2
root = "$data/root"
state = "$run/state"
temp = "$data/temp"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]
[grpc]
  address = "$socket"
TOML
mkdir -p "$data/temp" "$CEDANA_RUN_DIR" "$CEDANA_STATE_DIR"
chmod 0700 "$CEDANA_RUN_DIR" "$CEDANA_STATE_DIR"
# In a session of its own: a Ctrl-C or a timeout's signal for our whole process group must not end it before we have
# tidied up with its help.
setsid containerd --config "$run/config.toml" >"$log" 2>&1 </dev/null &
containerd_pid=$!
wait_for 15 c version >/dev/null || die "containerd does not answer"

# overlayfs cannot lie on another overlayfs (a container's root): copy instead.
snapshotter=${SNAPSHOTTER:-overlayfs}
[ "$(stat -f -c %T "$data")" != overlayfs ] || snapshotter=${SNAPSHOTTER:-native}
archive=${CEDANA_CACHE_DIR:-/var/cache/cedana}/busybox.tar
if [ ! -s "$archive" ]; then
  archive=$data/busybox.tar
  sh "$repository/scripts/make-image.sh" "$archive"
fi
c images import --snapshotter "$snapshotter" "$archive" >/dev/null

# --- run ---
step "Running a container that counts, with $runtime"
out=$data/counter.out
: >"$out"
# shellcheck disable=SC2086 # nothing here has spaces in it but $counter
c run --detach --runtime "$runtime" --snapshotter $snapshotter --log-uri "file://$out" "$image" counter sh -c "$counter"
wait_for 15 has_numbers "$out" 4 || die "the counter prints nothing"
show <"$out"
before=$(last_number "$out")

# --- checkpoint ---
step "Checkpointing it into containerd's content store"
started=$(now_ms)
c container checkpoint --rw --task counter "$checkpoint" >/dev/null
printf '    %s in %s ms\n' "$checkpoint" $(($(now_ms) - started))

step "Killing and removing the container"
remove_container counter
if c container ls -q | grep -qx counter; then die "the container cannot be removed"; fi
last=$(last_number "$out")
printf '    the last number that it printed: %s\n' "$last"

# --- restore ---
step "Restoring it from the checkpoint"
out=$data/restored.out
: >"$out"
# ctr reads the output until it leaves, which is as soon as the container runs. Then it waits in FIFOs that the shim
# holds open until we attach.
c container restore --rw --live restored "$checkpoint" >"$out" || die "the restore failed"
c task attach restored >>"$out" 2>&1 </dev/null &
attach_pid=$!
wait_for 15 has_numbers "$out" 4 || die "the restored container prints nothing"
show <"$out"

# --- is it the same program? It goes on with the next number, and leaves none out ---
first=$(first_number "$out")
# One more than the next, because a ctr that leaves may take a line with it that it has read and not yet written.
if [ "$first" -le "$before" ] || [ "$first" -gt $((last + 2)) ]; then
  die "it should have gone on between $((before + 1)) and $((last + 1)), not at $first"
fi
awk '/^count [0-9]+$/ { if (seen && $2 != previous + 1) exit 1; previous = $2; seen = 1 }' "$out" ||
  die "a number is missing"
step "It counted to $before, was checkpointed and killed, and went on with $first."
