#!/bin/sh
# Installs what this machine lacks to build, test and run cedana, on Debian 12 and 13:
#
#   scripts/setup.sh [--check] [--quiet] [--with-npm] [--with-callers]
#
#   --check         only say what is missing; exit status 1 if something is
#   --quiet         say nothing but what was done and what went wrong
#   --with-npm      Node and npm, too
#   --with-callers  Podman, Buildah, conmon and Docker, too: some 100 MB, for the tests of cedana-runtime only
#
# What is there and works stays as it is: a second run changes nothing. CRIU is judged by what it does on the running
# kernel (`criu check`, then a dump and a restore of a process with a listening TCP socket), because its version
# alone says little: 3.17 cannot dump anything on a recent kernel, 4.1.1 no socket.
#
# What Debian 12 is too old for comes from Debian 13 and, where that is too old for the kernel, from testing. For
# that the machine's own Debian sources are copied, with another suite, to /etc/apt/sources.list.d/cedana-*.sources
# and pinned below everything else, so that `apt upgrade` takes nothing more from there. Nothing that is
# installed from them starts a service. Other people's sources are neither used nor changed.
#
# For the tests, other versions of containerd are unpacked, not installed, to $CEDANA_CACHE_DIR (/var/cache/cedana):
# containerd-<version>/usr/bin/containerd, crit-<version of CRIU> (Python), callers (what calls an OCI runtime), and the image of
# the tests, busybox.tar.
set -eu
umask 022

repository=$(cd "$(dirname "$0")/.." && pwd)
cache=${CEDANA_CACHE_DIR:-/var/cache/cedana}
# Under sudo the path may lack these, and Debian has half of our tools there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

check=no quiet=no with_npm=no with_callers=no
for option in "$@"; do
  case $option in
    --check) check=yes ;;
    --quiet) quiet=yes ;;
    --with-npm) with_npm=yes ;;
    --with-callers) with_callers=yes ;;
    -h | --help) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) printf 'setup: unknown option %s (see --help)\n' "$option" >&2; exit 2 ;;
  esac
done

did() { printf 'setup: %s\n' "$*"; }
info() { [ "$quiet" = yes ] || printf 'setup: %s\n' "$*"; }
warn() { printf 'setup: warning: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "needs root: sudo $0${*:+ $*}"

work=$(mktemp -d "${TMPDIR:-/tmp}/cedana-setup.XXXXXX")
chmod 0755 "$work"     # apt downloads as a user of its own
policy=/usr/sbin/policy-rc.d
locked=no
cleanup() {
  status=$?
  trap '' INT TERM HUP
  # Without the lock, what is there may belong to another run in the middle of its installation.
  [ $locked = no ] || allow_services
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---------------------------------------------------------------------------------------------------------------
# What is missing? Each `need_…` succeeds if the thing is there and works.

# at_least VERSION WANTED: both dotted.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }
# The first thing that looks like a version in what a program prints.
version_of() { "$@" 2>/dev/null | grep -oE '[0-9]+(\.[0-9]+)+' | head -n 1; }
kernel() { uname -r | grep -oE '^[0-9]+\.[0-9]+'; }
have() { command -v "$1" >/dev/null 2>&1; }

# PACKAGE and how to see that it isn't needed. All of these are old enough in every supported Debian.
base_packages() {
  have gcc || echo gcc
  have g++ || echo g++
  have make || echo make
  [ -e /usr/include/stdio.h ] || echo libc6-dev
  [ -e /usr/include/linux/fs.h ] || echo linux-libc-dev
  [ -e /usr/include/xxhash.h ] || echo libxxhash-dev # digests of checkpoints; a header alone
  have xxh128sum || echo xxhash                      # what they are compared with in the tests
  have musl-gcc || echo musl-tools                   # the keeper is linked statically
  static_busybox || echo busybox-static              # the image of the tests and of the demo
  have ip || echo iproute2
  have iptables-restore || echo iptables             # CRIU locks the network of what it dumps with one of
  have nft || echo nftables                          # these two
  have ps || echo procps                             # the engines' `ps` command runs it
  have mkfs.ext4 || echo e2fsprogs                   # disks of virtual machines
  have mkfs.erofs || echo erofs-utils
  /usr/bin/python3 -c 'import json' 2>/dev/null || echo python3   # crit, which our decoding of images is compared with
  have lz4 || echo lz4                               # archives of checkpoints
  have zstd || echo zstd                             # the tests read ours with it
  have strace || echo strace                         # … and look with it which files the wrapper opens
  [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
  # For scripts/with-systemd.sh. Without systemd-sysv it is not what the machine boots.
  if [ "$with_callers" = yes ]; then
    [ -x /lib/systemd/systemd ] || echo systemd
    [ -e /lib/systemd/system/dbus.socket ] || echo dbus
  fi
  # Without a log of this call in ~/.npm.
  if [ "$with_npm" = yes ] && ! npm_config_logs_max=0 npm --version >/dev/null 2>&1; then
    have node || echo nodejs
    echo npm
  fi
}

static_busybox() { have busybox && ! ldd "$(command -v busybox)" 2>/dev/null | grep -q '=>'; }

# Engines. They are newer than what Debian 12 has, which is why they are apart.
engine_packages() {
  { have ctr && at_least "$(version_of containerd --version)" 1.7; } || echo containerd
  at_least "$(version_of runc --version)" 1.1 || echo runc
  crun --version 2>/dev/null | grep -q +CRIU || echo crun
  have checkpointctl || echo checkpointctl           # the tests let it read our archives
}

# --- CRIU ---

# What the trial dumps: a process with a listening TCP socket and, because containers have them, a connection.
# Perl, because perl-base is on every Debian.
# shellcheck disable=SC2016 # Perl's variables
trial_program='
use Socket; use POSIX ();
POSIX::close($_) for 3 .. 255;   # CRIU must see ours only, not what our callers leave open
socket(LISTENING, PF_INET, SOCK_STREAM, 0) && bind(LISTENING, sockaddr_in(0, INADDR_LOOPBACK)) && listen(LISTENING, 1) or die;
if ($ARGV[1] eq "connected") {
  socket(CLIENT, PF_INET, SOCK_STREAM, 0) && connect(CLIENT, getsockname LISTENING) && accept(SERVER, LISTENING) or die;
}
open(READY, ">", $ARGV[0]) && close READY or die;
select undef, undef, undef, 1 while 1;
'

# start_trial KIND: leaves the process in $trial_pid and its directory in $trial.
start_trial() {
  trial=$(mktemp -d "$work/trial.XXXXXX")
  # A session of its own and no terminal: CRIU refuses half a session.
  (cd / && exec setsid perl -e "$trial_program" "$trial/ready" "$1" </dev/null >/dev/null 2>&1) &
  trial_pid=$!
  attempts=0
  until [ -e "$trial/ready" ]; do
    attempts=$((attempts + 1))
    if [ $attempts = 200 ] || ! kill -0 "$trial_pid" 2>/dev/null; then return 1; fi   # 10 s
    sleep 0.05
  done
}
end_trial() {
  kill -KILL "$trial_pid" 2>/dev/null || :
  wait "$trial_pid" 2>/dev/null || :
}

# The error that a CRIU log is about: the one before the closing "Dumping FAILED".
criu_error() { grep 'Error (' "$1" 2>/dev/null | grep -v 'FAILED\|RLIMIT_NOFILE' | tail -n 1; }

# Leaves in $criu_fault why not.
criu_works() {
  criu_fault=''
  have criu || { criu_fault='it is not installed'; return 1; }
  if ! criu check >"$work/criu.log" 2>&1; then
    criu_fault="criu check: $(grep -iE 'error|looks' "$work/criu.log" | head -n 1)"
    return 1
  fi
  start_trial listening || { end_trial; criu_fault='the trial process does not start'; return 1; }
  if ! criu dump --tree "$trial_pid" --images-dir "$trial" --log-file dump.log >/dev/null 2>&1; then
    end_trial
    criu_fault="trial dump: $(criu_error "$trial/dump.log")"
    return 1
  fi
  wait "$trial_pid" 2>/dev/null || :   # it must be reaped before its pid is free for the restore
  if ! criu restore --images-dir "$trial" --restore-detached --log-file restore.log >/dev/null 2>&1; then
    criu_fault="trial restore: $(criu_error "$trial/restore.log")"
    return 1
  fi
  kill -KILL "$trial_pid" 2>/dev/null || { criu_fault='the restored trial process does not run'; return 1; }
}

# With which tool CRIU can lock the network of a process that is connected.
network_locks() {
  start_trial connected || { end_trial; return 0; }
  for lock in iptables nftables; do
    if criu dump --tree "$trial_pid" --images-dir "$trial" --log-file "$lock.log" --leave-running \
      --tcp-established --network-lock "$lock" >/dev/null 2>&1; then printf '%s ' "$lock"; fi
  done
  end_trial
}

# crun loads it when it runs, and its version must be that of CRIU or older.
have_libcriu() { ldconfig -p | grep -q 'libcriu\.so\.2 '; }

# --- other versions of containerd, and the image ---

# unpacked MAJOR.: the directory of such a version that runs here.
unpacked() {
  for directory in "$cache/containerd-$1"*; do
    if "$directory/usr/bin/containerd" --version >/dev/null 2>&1; then echo "$directory"; return 0; fi
  done
  return 1
}

# Python's own decoder: Debian 13's other one is in a library that is not unpacked with it.
run_crit() {
  PYTHONPATH=$cache/crit-$(version_of criu --version)/usr/lib/python3/dist-packages \
    PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python /usr/bin/python3 -m crit "$@"
}
crit_runs() { run_crit --version >/dev/null 2>&1; }

callers=$cache/callers
callers_run() {
  for program in bin/podman bin/conmon bin/buildah sbin/dockerd bin/docker bin/catatonit lib/podman/netavark; do
    LD_LIBRARY_PATH=$callers/lib "$callers/usr/$program" --version >/dev/null 2>&1 || return 1
  done
}

image_is_made() {
  [ -s "$cache/busybox.tar" ] && static_busybox && [ "$(image_inputs)" = "$(cat "$cache/busybox.inputs" 2>/dev/null)" ]
}
image_inputs() { cat "$(command -v busybox)" "$repository/scripts/make-image.sh" | sha256sum; }

# ---------------------------------------------------------------------------------------------------------------
# apt

# debian_sources FROM TO: the machine's own Debian sources (of FROM, its code name), one-line or deb822, as deb822
# with the suite TO. Only the archive itself with its updates and security fixes; of testing and
# unstable only the archive.
debian_sources() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
    awk '/^[ \t]*deb[ \t]/ {
      sub(/#.*/, ""); sub(/^[ \t]*deb[ \t]+/, ""); rest = ""
      if (sub(/^\[/, "")) {
        end = index($0, "]"); count = split(substr($0, 1, end - 1), options, " "); $0 = substr($0, end + 1)
        for (i = 1; i <= count; i++) {
          key = options[i]; sub(/=.*/, "", key); value = options[i]; sub(/^[^=]*=/, "", value); gsub(/,/, " ", value)
          if (key == "arch") key = "Architectures"
          rest = rest key ": " value "\n"
        }
      }
      components = ""; for (i = 3; i <= NF; i++) components = components " " $i
      printf "\nTypes: deb\nURIs: %s\nSuites: %s\nComponents:%s\n%s", $1, $2, components, rest
    }' >"$work/stanzas"
  for file in /etc/apt/sources.list.d/*.sources; do
    case $file in
      */cedana-*) continue ;;
    esac
    [ -e "$file" ] || continue
    echo; cat "$file"
  done >>"$work/stanzas"
  awk -v from="$1" -v to="$2" '
    function flush(   count, list, i, suite, suites, base) {
      if ((" " value["types"] " ") ~ / deb / && value["enabled"] !~ /no/ && value["uris"] ~ /debian/ &&
          (" " value["components"] " ") ~ / main /) {
        count = split(value["suites"], list, " ")
        for (i = 1; i <= count; i++) {
          suite = list[i]
          if (!sub("^(" from "|stable|oldstable|oldoldstable)", "", suite)) continue   # what remains is "", "-security" …
          if (suite != "" && (suite !~ /^-(updates|security)$/ || to == "testing" || to == "unstable")) continue
          base = base " " to suite
        }
        if (base != "") printf "Types: deb\nURIs:%s\nSuites:%s\nComponents: main\n%s\n", spaced(value["uris"]), base, rest
      }
      split("", value); rest = ""; field = ""
    }
    function spaced(text) { sub(/^ */, " ", text); return text }
    /^#/ { next }
    /^[ \t]*$/ { flush(); next }
    /^[ \t]/ { if (field in known) value[field] = value[field] $0; else rest = rest $0 "\n"; next }   # continues the field
    {
      field = tolower($0); sub(/:.*/, "", field)
      text = $0; sub(/^[^:]*:[ \t]*/, "", text); gsub(/\t/, " ", text)
      if (field in known) value[field] = text; else rest = rest $0 "\n"
    }
    BEGIN { split("types enabled uris suites components", names, " "); for (i in names) known[names[i]] = 1 }
    END { flush() }' "$work/stanzas"
}

# apt with nothing but the Debian sources in $work/sources: a broken source of somebody else cannot stop us, and the
# lists of the others stay.
apt() {
  command=$1
  shift
  env DEBIAN_FRONTEND=noninteractive DEBIAN_PRIORITY=critical APT_LISTCHANGES_FRONTEND=none NEEDRESTART_MODE=l \
    NEEDRESTART_SUSPEND=1 LC_ALL=C.UTF-8 "$command" \
    -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" -o APT::Get::List-Cleanup=false \
    -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
}

# Runs a command, and shows what it printed only if it fails.
run_quietly() {
  if "$@" >"$work/output" 2>&1 </dev/null; then return 0; fi
  tail -n 30 "$work/output" >&2
  return 1
}

refresh_lists() {
  # Another apt may hold the lists for a moment (unattended-upgrades): that lock has no time limit of apt's own.
  for attempt in 1 2 3 4 5; do
    if apt apt-get update -q -o APT::Update::Error-Mode=any >"$work/output" 2>&1 </dev/null; then return 0; fi
    [ "$attempt" = 5 ] || sleep $((attempt * 2))
  done
  grep -E '^(E|W|Err)' "$work/output" >&2 || tail -n 20 "$work/output" >&2
  return 1
}

use_own_sources() {
  if [ -s "$work/sources/own.sources" ]; then return 0; fi
  mkdir -p "$work/sources"
  debian_sources "$codename" "$codename" >"$work/sources/own.sources"
  [ -s "$work/sources/own.sources" ] || die "no Debian source for $codename found in /etc/apt: add one to go on"
  info "reading the package lists of $codename"
  refresh_lists || die "apt-get update fails for $codename"
}

# use_suite SUITE PRIORITY: adds it, for us and for later upgrades of what we install from it. Takes effect after
# the check that it can be read, so that no source is left behind that doesn't work.
use_suite() {
  [ "$1" != "$codename" ] || return 0
  if [ -s "$work/sources/cedana-$1.sources" ]; then return 0; fi
  # Keys of a newer release come with a newer keyring.
  run_quietly apt apt-get install -q -y --no-install-recommends --only-upgrade debian-archive-keyring || :
  { echo "# For packages that cedana needs newer than $codename has them; pinned in /etc/apt/preferences.d/cedana-$1."
    debian_sources "$codename" "$1"; } >"$work/cedana-$1.sources"
  cp "$work/cedana-$1.sources" "$work/sources/"
  info "reading the package lists of $1"
  if ! refresh_lists; then
    rm "$work/sources/cedana-$1.sources"
    die "apt-get update fails for $1: does the mirror in /etc/apt have that suite?"
  fi
  # Release files of a stable release call it "stable", "oldstable" … in a=; n= is the code name.
  case $1 in
    testing) pin="release a=testing" ;;
    *) pin="release n=$1*" ;;
  esac
  pin_file=/etc/apt/preferences.d/cedana-$1
  printf 'Package: *\nPin: %s\nPin-Priority: %s\n' "$pin" "$2" >"$work/pin"
  if ! cmp -s "$work/pin" "$pin_file"; then
    mkdir -p /etc/apt/preferences.d
    cp "$work/pin" "$pin_file"
    did "pinned $1 to priority $2 in $pin_file"
  fi
  if ! cmp -s "$work/cedana-$1.sources" "/etc/apt/sources.list.d/cedana-$1.sources"; then
    cp "$work/cedana-$1.sources" /etc/apt/sources.list.d/
    did "added $1 to apt's sources in /etc/apt/sources.list.d/cedana-$1.sources"
  fi
}

# version_in SUITE PACKAGE
version_in() { apt apt-cache madison "$2" 2>/dev/null | awk -F ' *\\| *' -v suite="$1" '$3 ~ " " suite "[-/]" { print $2; exit }'; }

# While we install, no service may start (policy-rc.d, exit status 101). What was there comes back, also when we
# were killed in the middle the last time.
forbid_services() {
  allow_services
  if [ -e $policy ]; then mv $policy $policy.before-cedana; fi
  printf '#!/bin/sh\n# Written by %s for the time of an installation.\nexit 101\n' "cedana's setup.sh" >$policy
  chmod 0755 $policy
}
allow_services() {
  if grep -qs "cedana's setup.sh" $policy; then rm $policy; fi
  if [ -e $policy.before-cedana ]; then mv $policy.before-cedana $policy; fi
}

# with_fixes SUITE: for apt's -t. The name alone would mean the archive only, and prefer its packages to the newer ones of its
# security fixes.
with_fixes() { echo "/^$1(-security|-updates)?\$/"; }

# install [-t SUITE] PACKAGE[=VERSION]...; fails, changing nothing, if that would remove something that matters.
install() {
  if ! apt apt-get install -s -q --no-install-recommends "$@" >"$work/plan" 2>&1; then
    return 1
  fi
  # The libraries that got new names in Debian 13 (libgnutls30, libgnutls30t64) are replaced, and
  # busybox-static is busybox with more in it.
  removed=$(awk '/^Remv / && $2 !~ /^lib/ && $2 != "busybox" { print $2 }' "$work/plan")
  if [ -n "$removed" ]; then
    # shellcheck disable=SC2086 # one line
    warn "not installing $*: it would remove" $removed
    return 1
  fi
  forbid_services
  # apt refuses to go on where a dpkg was killed.
  if [ -n "$(ls -A /var/lib/dpkg/updates)" ]; then run_quietly dpkg --configure -a || :; fi
  if ! run_quietly apt apt-get install -y -q --no-install-recommends "$@"; then
    allow_services
    return 1
  fi
  allow_services
  # The plan says what was done: Inst NAME [OLD] (NEW SUITE …). Name what was asked for, and count the rest.
  did "installed $(awk -v asked=" $* " '
    /^Inst / {
      version = $0; sub(/[^(]*\(/, "", version); sub(/ .*/, "", version)
      if (index(asked, " " $2 " ") || index(asked, " " $2 "=")) named = named (named == "" ? "" : ", ") $2 " " version
      else others++
    }
    END { print named (others ? " (and " others " packages that they need)" : "") }' "$work/plan")"
}

plan_failed() { grep -E '^(E:|The following| [a-z0-9.+-]+ :)' "$work/plan" | head -n 20 >&2; die "apt cannot install $*"; }

# ---------------------------------------------------------------------------------------------------------------
# Installing

install_base() {
  use_own_sources
  info "installing $*"
  install "$@" && return 0
  # Where libc is already Debian 13's, libc6-dev of Debian 12 doesn't fit any more.
  [ "$codename" = bookworm ] || plan_failed "$@"
  use_suite trixie 100
  install -t "$(with_fixes trixie)" "$@" || plan_failed "$@"
}

install_engines() {
  use_own_sources
  use_suite trixie 100
  info "installing $* from trixie"
  had_containerd=no
  if have containerd; then had_containerd=yes; fi
  # Without this, an engine of Debian 12 that is installed but too old is left as it is.
  install -t "$(with_fixes trixie)" "$@" || plan_failed "$@"
  # Debian enables its service for the next start of the machine. We need the program only.
  if [ $had_containerd = no ] && have containerd && have systemctl && systemctl --quiet is-enabled containerd 2>/dev/null; then
    systemctl --quiet disable containerd 2>/dev/null && did "left containerd's service disabled; systemctl enable --now containerd starts it"
  fi
}

# Packages from the same source must have the same version: where libnl-route is installed, a newer libnl-3 takes it along.
installed_siblings() {
  # shellcheck disable=SC2016 # dpkg's variables
  dpkg-query -W -f '${db:Status-Abbrev} ${source:Package} ${Package}\n' |
    awk '$1 == "ii" && ($2 == "criu" || $2 == "libnl3" || $2 == "libnet") { print $3 }'
}

# install_criu SUITE
install_criu() {
  use_own_sources
  use_suite trixie 100
  [ "$1" = trixie ] || use_suite "$1" 90
  # Named one by one with their versions: `-t testing` would bring testing's libc and much more along, and Debian
  # 13's is new enough.
  criu_set=''
  for package in $({ printf '%s\n' criu libcompel1 libcriu2 libnet9 libnl-3-200; installed_siblings; } | sort -u); do
    version=$(version_in "$1" "$package")
    [ -z "$version" ] || criu_set="$criu_set $package=$version"
  done
  info "installing CRIU from $1"
  # shellcheck disable=SC2086 # a list of words
  install -t "$(with_fixes trixie)" $criu_set && return 0
  [ "$1" != trixie ] || return 1
  # It needs more from that suite than those few.
  install -t "$1" criu libcriu2
}

# From the suite with the fewest surprises to the newest; nothing is installed from unstable. Linux 6.16 refuses
# SO_PASSCRED on inet sockets, which CRIU before 4.2 wants when it dumps one: no need to download and try those.
mend_criu() {
  suites='trixie testing'
  if at_least "$(kernel)" 6.16; then suites=testing; fi
  for suite in $suites; do
    if install_criu "$suite"; then
      if criu_works; then
        did "CRIU $(version_of criu --version) works on this kernel ($(uname -r))"
        return 0
      fi
      warn "CRIU of $suite does not work here: $criu_fault"
    fi
  done
  die "no CRIU of Debian works on this kernel ($(uname -r)): $criu_fault"
}

# read_suite SUITE: package lists of a suite that nothing is ever installed from, for suite_apt; they are gone afterwards.
read_suite() {
  suite_work=$work/suite.$1
  mkdir -p "$suite_work/sources" "$suite_work/lists/partial" "$suite_work/cache/archives/partial" "$suite_work/deb"
  debian_sources "$codename" "$1" >"$suite_work/sources/suite.sources"
  suite_apt apt-get update -q -o APT::Update::Error-Mode=any >"$work/output" 2>&1 </dev/null
}
suite_apt() {
  command=$1
  shift
  apt "$command" -o Dir::Etc::sourceparts="$suite_work/sources" -o Dir::State::lists="$suite_work/lists" \
    -o Dir::Cache="$suite_work/cache" "$@"
}

# unpack_containerd SUITE MINIMUM BELOW: the newest containerd of SUITE with MINIMUM <= version < BELOW.
unpack_containerd() {
  read_suite "$1" || return 1
  for version in $(suite_apt apt-cache madison containerd | awk -F ' *\\| *' '{ print $2 }'); do
    upstream=$(echo "${version#*:}" | grep -oE '^[0-9]+(\.[0-9]+)+')
    if at_least "$upstream" "$2" && ! at_least "$upstream" "$3"; then break; fi
    upstream=''
  done
  [ -n "${upstream:-}" ] || return 1
  (cd "$suite_work/deb" && suite_apt apt-get download -q "containerd=$version" >"$work/output" 2>&1) || return 1
  # Unpacked beside its place and renamed: what has the name is whole.
  target=$cache/containerd-$upstream
  rm -rf "$cache/.unpacking" "$target"
  dpkg -x "$suite_work"/deb/containerd_*.deb "$cache/.unpacking" && mv "$cache/.unpacking" "$target" || return 1
  rm -rf "$suite_work"
  if ! "$target/usr/bin/containerd" --version >/dev/null 2>&1; then
    warn "containerd $version of $1 does not run here: $("$target/usr/bin/containerd" --version 2>&1 | head -n 1)"
    rm -rf "$target"
    return 1
  fi
  did "unpacked containerd $version to $target"
}

unpack_containerd_2() {
  info "unpacking containerd 2.x for the tests"
  for suite in testing unstable trixie-backports; do
    if unpack_containerd $suite 2 2.3; then return 0; fi
  done
  warn "no containerd 2.x found; the tests with it will be skipped"
}
unpack_containerd_1_6() {
  info "unpacking containerd 1.6 for the tests"
  unpack_containerd bookworm 1.6 1.7 || warn "no containerd 1.6 found; the tests with it will be skipped"
}

# crit and what it is written in, of the same version as the CRIU that is installed: its definitions of the images must be CRIU's.
# Unpacked, because installed they would want another Python than this Debian's; any Python runs them.
unpack_crit() {
  info "unpacking crit for the tests"
  wanted=$(version_of criu --version)
  for suite in testing trixie unstable; do
    read_suite $suite || continue
    version=$(suite_apt apt-cache madison python3-pycriu | awk -F ' *\\| *' -v wanted="$wanted" 'index($2, wanted "-") == 1 { print $2; exit }')
    [ -n "$version" ] || continue
    (cd "$suite_work/deb" && suite_apt apt-get download -q "python3-pycriu=$version" python3-protobuf >"$work/output" 2>&1) || continue
    rm -rf "$cache/.unpacking" "$cache/crit-$wanted"
    for package in "$suite_work"/deb/*.deb; do dpkg -x "$package" "$cache/.unpacking"; done
    mv "$cache/.unpacking" "$cache/crit-$wanted"
    rm -rf "$suite_work"
    if crit_runs; then
      did "unpacked crit $version to $cache/crit-$wanted"
      return 0
    fi
    warn "crit $version of $suite does not run here: $(run_crit --version 2>&1 | tail -n 1)"
    rm -rf "$cache/crit-$wanted"
  done
  warn "no crit of CRIU $wanted found; the tests against it will be skipped"
}

# Podman, Buildah, conmon and Docker of Debian 13, with the libraries that no other package of ours brings. Unpacked, because
# installed they would start services at every boot, and on Debian 12 take half of the system with them to Debian 13 (systemd,
# util-linux, OpenSSL). Programs are below usr/, libraries (for LD_LIBRARY_PATH) in lib/.
unpack_callers() {
  info "unpacking podman, buildah, conmon and docker for the tests"
  read_suite trixie || return 1
  (cd "$suite_work/deb" && suite_apt apt-get download -q podman conmon buildah docker.io docker-cli catatonit netavark \
    libgpgme11t64 libassuan9 libgpg-error0 libglib2.0-0t64 libsubid5 libsqlite3-0 >"$work/output" 2>&1) || return 1
  rm -rf "$cache/.unpacking" "$callers"
  mkdir -p "$cache/.unpacking/lib"
  for package in "$suite_work"/deb/*.deb; do
    dpkg --fsys-tarfile "$package" | tar -x -C "$cache/.unpacking" --wildcards --exclude '*/share/*' './usr/bin/*' './usr/sbin/*' \
      './usr/lib/*' './usr/libexec/*' 2>/dev/null || :   # a package has not all of these
  done
  for library in "$cache"/.unpacking/usr/lib/*-linux-gnu/*.so.*; do mv "$library" "$cache/.unpacking/lib/"; done
  mv "$cache/.unpacking" "$callers"
  rm -rf "$suite_work"
  callers_run || return 1
  did "unpacked podman, buildah, conmon and docker to $callers"
}

make_image() {
  sh "$repository/scripts/make-image.sh" "$cache/busybox.tar"
  image_inputs >"$cache/busybox.inputs"
  did "made the image $cache/busybox.tar"
}

# ---------------------------------------------------------------------------------------------------------------
# What the machine is like: for bug reports, and to know what tests will be skipped.

say_facts() {
  case $(stat -f -c %T /sys/fs/cgroup 2>/dev/null) in
    cgroup2fs) cgroups=v2 ;;
    tmpfs) if [ -d /sys/fs/cgroup/unified ]; then cgroups='hybrid (v1, and v2 beside it), which crun refuses'; else cgroups=v1; fi ;;
    *) cgroups='none mounted' ;;
  esac
  capabilities=$(awk '/^CapEff:/ { print $2 }' /proc/self/status)
  # CAP_SYS_RESOURCE is number 24.
  if [ $((0x$capabilities >> 24 & 1)) = 1 ]; then resource=yes; else resource='no: a negative oom_score_adj and higher limits are refused'; fi
  info "kernel $(uname -r), cgroups $cgroups"
  info "CAP_SYS_RESOURCE: $resource"
  if have criu; then
    locks=$(network_locks)
    info "CRIU $(version_of criu --version); locks the network with: ${locks:-nothing, so established connections cannot be dumped}"
  fi
  info "runc $(version_of runc --version), crun $(version_of crun --version), containerd $(version_of containerd --version)$(
    for directory in "$cache"/containerd-*; do [ ! -x "$directory/usr/bin/containerd" ] || printf ', %s' "${directory##*/containerd-}"; done)"
}

# ---------------------------------------------------------------------------------------------------------------

words() { tr '\n' ' ' | sed 's/ *$//'; }

missing=''
base=$(base_packages | words)
engines=$(engine_packages | words)
[ -z "$base$engines" ] || missing=$(echo "$base $engines" | sed 's/^ *//; s/ *$//')
criu=ok
if ! criu_works; then
  criu=$criu_fault
  missing="${missing:+$missing, }a CRIU that works on this kernel ($criu_fault)"
elif ! have_libcriu; then
  criu='no libcriu'
  missing="${missing:+$missing, }libcriu2"
fi
unpacked 2. >/dev/null || missing="${missing:+$missing, }containerd 2.x in $cache"
unpacked 1.6. >/dev/null || missing="${missing:+$missing, }containerd 1.6 in $cache"
crit_runs || missing="${missing:+$missing, }crit in $cache"
[ "$with_callers" = no ] || callers_run || missing="${missing:+$missing, }podman, buildah, conmon and docker in $callers"
image_is_made || missing="${missing:+$missing, }the image $cache/busybox.tar"

if [ "$check" = yes ]; then
  [ -z "$missing" ] || did "missing: $missing"
  say_facts
  [ -z "$missing" ] || exit 1
  info "nothing is missing"
  exit 0
fi

if [ -z "$missing" ]; then
  say_facts
  info "nothing to do"
  exit 0
fi

ID='' VERSION_ID='' VERSION_CODENAME=''
# shellcheck source=/dev/null
if [ -r /etc/os-release ]; then . /etc/os-release; fi
# A newer base-files may have come along with what Debian 12 lacked: the machine's own sources say what it is.
for codename in $VERSION_CODENAME bookworm $VERSION_CODENAME; do
  [ -z "$(debian_sources "$codename" "$codename")" ] || break
done
case $ID:$VERSION_ID in
  debian:12 | debian:13) ;;
  *)
    die "this is ${PRETTY_NAME:-not Debian}, and only Debian 12 and 13 are set up by themselves.
Please install by hand what is missing: $missing.
In all, cedana wants: gcc, g++, make, musl-gcc, xxhash with its header, a static busybox, iproute2, iptables, nftables, e2fsprogs, erofs-utils, lz4, zstd, strace,
checkpointctl, systemd and dbus (for tests alone), containerd 1.7 with ctr, runc, crun with CRIU support (libcriu), and CRIU, on Linux 6.16 and newer at least 4.2.
containerd 1.6 and 2.x belong in $cache/containerd-<version>/usr/bin/, for the tests alone." ;;
esac

mkdir -p "$cache"
# One at a time. The lock goes away with us.
exec 9>"$cache/.lock"
flock 9
locked=yes

# shellcheck disable=SC2086 # lists of words
{
  [ -z "$base" ] || install_base $base
  [ -z "$engines" ] || install_engines $engines
}
[ "$criu" = ok ] || mend_criu
unpacked 2. >/dev/null || unpack_containerd_2
unpacked 1.6. >/dev/null || unpack_containerd_1_6
crit_runs || unpack_crit
if [ "$with_callers" = yes ] && ! callers_run && ! unpack_callers; then
  tail -n 3 "$work/output" >&2
  warn "podman, buildah, conmon and docker could not be unpacked; the tests with them will be skipped"
fi
image_is_made || make_image

# What was missing must be there now.
left=$({ base_packages; engine_packages; } | words)
[ -z "$left" ] || die "still missing after the installation: $left"
say_facts
info "done"
