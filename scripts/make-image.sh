#!/bin/sh
# Makes the small image that the demo and the tests run, without docker and without a registry:
#
#   scripts/make-image.sh OUT.tar [NAME]
#
# OUT.tar is an OCI image layout (oci-layout, index.json, blobs/) with docker's manifest.json beside it, so
# `ctr image import`, `podman load` and `docker load` all take it, under NAME (cedana.local/busybox:latest).
# Its only layer holds busybox-static, a link for each applet, and the few directories and files that
# programs expect. The same busybox gives the same bytes: times are 0, owners root, names sorted.
#
# BUSYBOX names another static busybox, IMAGE_CMD another command than a shell (a JSON array). Needs GNU tar and sha256sum.
set -eu
umask 022

die() { printf 'make-image: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in
  '' | -*) die "usage: make-image.sh OUT.tar [NAME]" ;;
esac
out=$1
name=${2:-cedana.local/busybox:latest}
busybox=${BUSYBOX:-$(command -v busybox || true)}
[ -x "$busybox" ] || die "no busybox: install the package busybox-static, or set BUSYBOX"
# A dynamically linked one would miss its libraries in the image.
if ldd "$busybox" 2>/dev/null | grep -q '=>'; then
  die "$busybox is not static: install the package busybox-static, or set BUSYBOX"
fi

case $(uname -m) in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) architecture=$(uname -m) ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/cedana-image.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# --- the root file system ---
root=$work/root
mkdir -p "$root/bin" "$root/dev" "$root/etc" "$root/home" "$root/proc" "$root/root" "$root/run" "$root/sys" \
  "$root/tmp" "$root/usr/bin" "$root/var/tmp"
chmod 1777 "$root/tmp" "$root/var/tmp"
chmod 0700 "$root/root"
cp "$busybox" "$root/bin/busybox"
chmod 0755 "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
  [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
ln -s ../../bin/busybox "$root/usr/bin/env"   # `#!/usr/bin/env` in scripts
ln -s /run "$root/var/run"
printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/home:/bin/false' >"$root/etc/passwd"
printf '%s\n' 'root:x:0:' 'tty:x:5:' 'nogroup:x:65534:' >"$root/etc/group"

archive() {   # archive DIRECTORY OUT MEMBER...: a tar that depends on nothing but the contents
  directory=$1 archive=$2
  shift 2
  tar --create --file "$archive" --directory "$directory" --format ustar --sort name --mtime @0 \
    --owner 0 --group 0 --numeric-owner "$@"
}
digest() { sha256sum "$1" | cut -d ' ' -f 1; }
size() { stat -c %s "$1"; }
add_blob() {   # add_blob FILE: moves it to its place, leaves its digest in $blob and its size in $blob_size
  blob=$(digest "$1") blob_size=$(size "$1")
  mv "$1" "$work/image/blobs/sha256/$blob"
}

# --- layer, config, manifest, index: each names the one before by its digest ---
mkdir -p "$work/image/blobs/sha256"
archive "$root" "$work/layer" .
add_blob "$work/layer"
layer=$blob layer_size=$blob_size

cat >"$work/config" <<JSON
{"architecture":"$architecture","os":"linux","created":"1970-01-01T00:00:00Z","config":{"Env":["PATH=/usr/bin:/bin"],"Cmd":${IMAGE_CMD:-[\"sh\"]},"WorkingDir":"/"},"rootfs":{"type":"layers","diff_ids":["sha256:$layer"]},"history":[{"created":"1970-01-01T00:00:00Z","created_by":"make-image.sh"}]}
JSON
add_blob "$work/config"
config=$blob config_size=$blob_size

cat >"$work/manifest" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:$config","size":$config_size},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:$layer","size":$layer_size}]}
JSON
add_blob "$work/manifest"
manifest=$blob manifest_size=$blob_size

cat >"$work/image/index.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:$manifest","size":$manifest_size,"platform":{"architecture":"$architecture","os":"linux"},"annotations":{"io.containerd.image.name":"$name","org.opencontainers.image.ref.name":"${name##*:}"}}]}
JSON
cat >"$work/image/manifest.json" <<JSON
[{"Config":"blobs/sha256/$config","RepoTags":["$name"],"Layers":["blobs/sha256/$layer"]}]
JSON
printf '{"imageLayoutVersion":"1.0.0"}\n' >"$work/image/oci-layout"

# Written beside its place and renamed, so that nobody imports half an archive.
archive "$work/image" "$out.$$" oci-layout index.json manifest.json blobs || { rm -f "$out.$$"; exit 1; }
mv "$out.$$" "$out"
