#!/bin/sh
# with-systemd.sh COMMAND [ARG...]: COMMAND on a host of its own where systemd is process 1 and all cgroups are of version 2, as on
# a Debian that was booted; on any machine, also where neither is so.
#
# It is this machine's kernel, files and network in namespaces of their own (processes, mounts, cgroups, host name), with an empty
# /run, an /etc whose changes are forgotten, and the systemd and D-Bus of this machine. systemd knows no other unit of the machine's. Only the
# controllers that the machine has in version 2 are there. Of the hierarchies of version 1, which nobody sees in it, it has cgroups of its own
# where we are at the root: an engine that checkpoints alone puts those of its root into the images, and makes them again that have gone
# since, which would be the whole machine's. With COMMAND's end everything in it ends; its status is ours, or 69 where the machine lacks what
# such a host is made of.
set -eu

die() { printf 'with-systemd: %s\n' "$*" >&2; exit 1; }
lacks() { printf 'with-systemd: %s\n' "$*" >&2; exit 69; }

[ $# -gt 0 ] || { sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2; }
[ "$(id -u)" = 0 ] || die "needs root"
for program in /lib/systemd/systemd dbus-daemon systemd-run unshare nsenter setpriv; do
  command -v "$program" >/dev/null || lacks "$program is not on this machine: scripts/setup.sh --with-callers"
done

if [ "${WITH_SYSTEMD:-}" != inside ]; then
  for top in /sys/fs/cgroup/unified /sys/fs/cgroup; do
    [ ! -e "$top/cgroup.procs" ] || break
  done
  [ -e "$top/cgroup.controllers" ] || lacks "no cgroups of version 2 at /sys/fs/cgroup or /sys/fs/cgroup/unified"
  cgroup=$top/with-systemd-$$
  others=''
  dir=$(mktemp -d /run/with-systemd.XXXXXX)
  host=''

  # Ends what is in the host, which is everything with its process 1, and takes the cgroups away.
  clean_up() {
    [ -z "$host" ] || kill -KILL "$host" 2>/dev/null || :
    [ -z "$host" ] || wait "$host" 2>/dev/null || :
    [ ! -d "$cgroup" ] || {
      echo 1 >"$cgroup/cgroup.kill" 2>/dev/null || :
      i=0
      # shellcheck disable=SC2086 # a list
      until find "$cgroup" $others -depth -type d -exec rmdir {} + 2>/dev/null || [ $((i += 1)) -gt 100 ]; do sleep 0.05; done
    }
    rm -rf "$dir"
  }
  trap clean_up EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP

  mkdir "$cgroup"
  for controller in $(cat "$top/cgroup.controllers"); do
    echo "+$controller" >"$top/cgroup.subtree_control" 2>/dev/null || : # in use elsewhere: not there, then
  done
  while IFS=: read -r _ controllers path; do
    at=/sys/fs/cgroup/${controllers#name=}
    [ -n "$controllers" ] && [ "$path" = / ] && [ -e "$at/cgroup.procs" ] || continue
    own=$at/${cgroup##*/}
    mkdir "$own"
    for file in cpuset.cpus cpuset.mems; do # without which nobody gets in
      [ ! -e "$at/$file" ] || cat "$at/$file" >"$own/$file" || :
    done
    # A hierarchy that lets nobody in is as it was.
    if sh -c 'echo 0 >"$1/cgroup.procs"' sh "$own"; then others="$others $own"; else rmdir "$own"; fi
  done </proc/self/cgroup
  # COMMAND of a shell that is in those.
  in_others='for at in '$others'; do echo 0 >"$at/cgroup.procs"; done; exec "$@"'
  mkfifo "$dir/up"
  # unshare waits for its child, and ends it with itself, as it ends with us. Only the child is in the cgroup: its own has to be empty for a cgroup below
  # to get controllers.
  WITH_SYSTEMD=inside sh -c "$in_others" sh setpriv --pdeathsig KILL unshare --mount --uts --pid --fork --kill-child --propagation private \
    sh -c 'echo 0 >"$1/cgroup.procs" && exec unshare --cgroup sh "$2" "$3"' sh "$cgroup" "$0" "$dir" \
    >"$dir/log" 2>&1 </dev/null &
  host=$!
  up=$(timeout 30 cat "$dir/up") || { cat "$dir/log" >&2; die "systemd did not come up"; }
  pid=$(cat "/proc/$host/task/$host/children")
  [ "$up" = up ] && [ -n "$pid" ] || { cat "$dir/log" >&2; die "systemd did not come up"; }
  # A shell that waits, rather than exec: clean_up follows.
  status=0
  sh -c "$in_others" sh nsenter --target "${pid% }" --mount --pid --cgroup --uts --wdns="$PWD" \
    systemd-run --quiet --scope --unit=command --property=Delegate=yes -- "$@" || status=$?
  exit "$status"
fi

# Process 1 of the new host; it becomes systemd.
dir=$1
mount -t proc -o nosuid,nodev,noexec proc /proc
exec 3>"$dir/up"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mkdir -p /run/etc/upper /run/etc/work /run/systemd/system /run/lock
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work etc /etc
umount --recursive /sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
# systemd knows no unit of the machine's but D-Bus: whatever a unit of the tests wants by default is there and does nothing. The machine's
# own sysinit.target would set up the machine anew, and begin by emptying /tmp.
for target in basic local-fs network multi-user paths remote-fs shutdown slices sockets sysinit timers umount; do
  printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' "$target" >"/run/systemd/system/$target.target"
done
cp /lib/systemd/system/dbus.socket /lib/systemd/system/dbus.service /run/systemd/system/
cat >/run/systemd/system/with-systemd.target <<'UNIT'
[Unit]
Description=A host for one command
DefaultDependencies=no
Requires=dbus.socket
After=dbus.socket
UNIT
export SYSTEMD_UNIT_PATH=/run/systemd/transient:/run/systemd/system SYSTEMD_GENERATOR_PATH=/run/systemd/no-generators
# systemd raises limits in /proc/sys that are the whole machine's.
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
(
  exec </dev/null
  until [ "$(systemctl is-active with-systemd.target 2>/dev/null)" = active ]; do sleep 0.05; done
  umount --lazy /proc/sys # systemd keeps a file in it open
  echo up >&3
) &
exec 3>&-
export container=other
unset WITH_SYSTEMD
exec /lib/systemd/systemd --system --unit=with-systemd.target --log-target=console --show-status=no
