#!/bin/sh
# with-vm.sh COMMAND [ARG...]: COMMAND, in the repository, on a virtual machine with Debian 13 as one installs it: its kernel (which
# tracks changed pages, so that there are pre-dumps), its systemd, cgroups of version 2 with all controllers. It has no network.
#
#   npm run test:vm -- test/live/oci-flags.test.ts -t "chains of pre-dumps"
#
# Everything is made of Debian's packages: a disk of debootstrap and scripts/setup.sh --with-callers, and the qemu that starts it, which is
# not installed on this machine. That takes some minutes and 4 GB below /var/tmp, and is removed at the end; with CEDANA_VM_DIR it is kept in that directory,
# for the next time. The repository comes along as it is built; what the command changes is forgotten.
#
# Its processor is computed, six times slower than this one and slower where others are at work; its clock goes with what it has computed, so
# no time-out ends early. CEDANA_VM_ACCEL=kvm where that works. The command's status is ours, or 69 where the machine lacks what is needed.
set -eu
umask 022

die() { printf 'with-vm: %s\n' "$*" >&2; exit 1; }
lacks() { printf 'with-vm: %s\n' "$*" >&2; exit 69; }
say() { printf 'with-vm: %s\n' "$*" >&2; }

[ $# -gt 0 ] || { sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2; }
[ "$(id -u)" = 0 ] || die "needs root"
[ "$(uname -m)" = x86_64 ] || lacks "no machine is made on $(uname -m)"
PATH=$PATH:/usr/sbin:/sbin
for program in debootstrap mkfs.ext4 unshare pivot_root setpriv; do
  command -v $program >/dev/null || lacks "$program is not on this machine: apt-get install debootstrap e2fsprogs util-linux"
done
repository=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$repository/bin/cedana-runtime" ] || lacks "the repository is not built: npm run build"

run=$(mktemp -d /var/tmp/cedana-vm.XXXXXX)
made=${CEDANA_VM_DIR:-$run}
mkdir -p "$made"
machine='' reader=''
clean_up() {
  for pid in $machine $reader; do
    kill -KILL "$pid" 2>/dev/null || :
    wait "$pid" 2>/dev/null || :
  done
  rm -rf "$run"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# in_root DIRECTORY COMMAND...: as if that were all of the machine. $run is /mnt there. Its mounts and processes end with it.
in_root() {
  root=$1
  shift
  # shellcheck disable=SC2016 # the inner shell's
  setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --propagation private sh -eu -c '
    root=$1 run=$2; shift 2
    mount --bind "$root" "$root"; mount --bind "$run" "$root/mnt"; cd "$root"
    mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev
    mount -t tmpfs -o mode=755 tmpfs run
    cp /etc/resolv.conf etc/resolv.conf; mkdir run/old; pivot_root . run/old; umount -l run/old; rmdir run/old
    exec "$@"' sh "$root" "$run" env -C / DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"
}

# --- the disk, and qemu ---

# install DIRECTORY PACKAGE...
install() {
  into=$1
  shift
  # shellcheck disable=SC2016
  in_root "$into" sh -eu -c 'printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
    apt-get update -q; apt-get install -y -q --no-install-recommends "$@"; apt-get clean' sh "$@" >>"$run/log" 2>&1
}

make() {
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' 2>/dev/null | head -n 1)
  eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
  [ -z "${http_proxy:-}" ] || export http_proxy
  say "making the machine (its log: $run/log)"
  rm -rf "$made/qemu" "$made/disk" "$made/whole"
  debootstrap --variant=minbase --include=ca-certificates trixie "$made/qemu" ${mirror:+"$mirror"} >>"$run/log" 2>&1
  disk=$made/disk
  cp -a "$made/qemu" "$disk"
  install "$made/qemu" qemu-system-x86
  install "$disk" linux-image-amd64 initramfs-tools zstd systemd-sysv udev dbus iproute2 procps kmod
  # A machine whose list of testing has expired gets it all the same: CRIU comes from there.
  echo 'Acquire::Check-Valid-Until "false";' >"$disk/etc/apt/apt.conf.d/with-vm"
  mkdir "$disk/mnt/repository"
  cp -a "$repository/scripts" "$repository/test" "$run/"
  in_root "$disk" sh /mnt/scripts/setup.sh --with-callers >>"$run/log" 2>&1
  rm -rf "$run/scripts" "$run/test" "$disk/usr/sbin/policy-rc.d" "$disk/var/lib/apt/lists" "$disk/usr/share/doc" "$disk/usr/share/locale"
  for unit in containerd.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer; do
    ln -sf /dev/null "$disk/etc/systemd/system/$unit"
  done
  echo '/dev/vda / ext4 defaults 0 1' >"$disk/etc/fstab"
  echo cedana >"$disk/etc/hostname"
  echo '127.0.0.1 localhost cedana' >"$disk/etc/hosts"
  cat >"$disk/etc/systemd/system/with-vm.service" <<'UNIT'
[Unit]
Description=What the machine is for
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c "tr -d '\\0' </dev/vdc >/run/with-vm; exec sh /run/with-vm"
[Install]
WantedBy=graphical.target
UNIT
  mkdir -p "$disk/etc/systemd/system/graphical.target.wants"
  ln -sf ../with-vm.service "$disk/etc/systemd/system/graphical.target.wants/"
  cp "$disk"/boot/vmlinuz-* "$made/vmlinuz"
  cp "$disk"/boot/initrd.img-* "$made/initrd"
  mkfs.ext4 -q -F -d "$disk" "$made/root.img" 6G >>"$run/log" 2>&1
  rm -rf "$disk"
  touch "$made/whole"
}

if [ ! -e "$made/whole" ]; then
  make || { tail -n 20 "$run/log" >&2; lacks "the machine could not be made, for the reason above"; }
fi

# --- the command ---

mkfs.ext4 -q -F -d "$repository" "$run/repository.img" 3G >>"$run/log" 2>&1 || die "the repository's disk could not be made: $(tail -n 1 "$run/log")"
quoted=''
for word; do quoted="$quoted '$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"; done
cat >"$run/job" <<JOB
stty -F /dev/ttyS1 raw
work() {
mkdir -p '$repository' && mount /dev/vdb '$repository' && cd '$repository' || return
mount -o remount,size=60% /run
export HOME=/root TERM=dumb PATH='$repository/node_modules/.bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
status=0
$quoted || status=\$?
{ echo "status \$status"; head -c 60000 /dev/zero; } >/dev/vdc
}
work </dev/null 2>&1 | cat >/dev/ttyS1 # for the command it is no terminal
sync
systemctl poweroff --no-block
JOB
truncate -s 65536 "$run/job"

case ${CEDANA_VM_ACCEL:-tcg} in
  tcg) accel='-accel tcg,thread=single -icount shift=0 -cpu max -smp 1' ;;
  *) accel="-accel $CEDANA_VM_ACCEL -cpu host -smp 2" ;;
esac
for file in root.img vmlinuz initrd; do
  [ "$made" = "$run" ] || ln "$made/$file" "$run/$file" 2>/dev/null || cp --sparse=always "$made/$file" "$run/$file"
done
mkfifo "$run/output"
cat "$run/output" &
reader=$!
# shellcheck disable=SC2086 # lists of words
in_root "$made/qemu" env TMPDIR=/mnt qemu-system-x86_64 -M pc $accel -m 6G -display none -monitor none -nic none -no-reboot \
  -kernel /mnt/vmlinuz -initrd /mnt/initrd -append 'root=/dev/vda rw console=ttyS0 quiet' \
  -drive file=/mnt/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe \
  -drive file=/mnt/repository.img,format=raw,if=virtio,snapshot=on,cache=unsafe \
  -drive file=/mnt/job,format=raw,if=virtio \
  -serial file:/mnt/console -serial file:/mnt/output </dev/null >"$run/qemu.log" 2>&1 &
machine=$!
wait "$machine" || { cat "$run/qemu.log" >&2; die "qemu failed"; }
machine=''
wait "$reader"
reader=''
status=$(tr -d '\0' <"$run/job" | sed -n 's/^status \([0-9]*\)$/\1/p')
[ -n "$status" ] || { tail -n 20 "$run/console" >&2; die "the machine ended before the command did"; }
exit "$status"
