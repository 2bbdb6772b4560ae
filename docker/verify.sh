#!/usr/bin/env bash
# Build an image, use it, and run compose.yaml, without a Docker engine: bash docker/verify.sh [cpu|cuda]
# Run as root on Debian or Ubuntu, with buildah, debootstrap and iproute2. It needs 10 GB in ${TMPDIR:-/var/tmp} and
# about ten minutes. The base is a Debian from debootstrap. cuda.Dockerfile gets torch for CPUs on it, so that everything
# except its FROM line is tested.
#   MIRROR         mirror of Debian
#   TORCH_INDEX    index that torch comes from, or empty for the index that pip is configured for
#   VERIFY_MOUNTS  directories to mount into the build, in addition to those in pip's settings on this machine
#   VERIFY_STORE   directory that keeps base and image. Without it, everything is removed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=docker/${1:-cpu}.Dockerfile
refuse() { echo "verify.sh: $*" >&2 && exit 1; }
[ -f "$file" ] || refuse "${1:-cpu}: there is no $file. Pass cpu or cuda."
[ "$(id -u)" = 0 ] || refuse "chroots and network namespaces need root. Run as root."
for tool in buildah debootstrap ip; do
    command -v "$tool" >/dev/null || refuse "no $tool. Run apt-get install buildah debootstrap iproute2."
done

work=$(mktemp -d "${TMPDIR:-/var/tmp}/distclip-verify.XXXXXX")
spaces=() boxes=()
finish() {
    local code=$?
    stop
    for space in ${spaces[@]+"${spaces[@]}"}; do ip netns del "$space" || true; done
    for box in ${boxes[@]+"${boxes[@]}"}; do buildah rm "$box" >/dev/null || true; done
    rm -rf --one-file-system "$work"
    [ "$code" = 0 ] || echo "verify.sh: FAILED" >&2
}
stop() {
    for space in ${spaces[@]+"${spaces[@]}"}; do ip netns pids "$space" | xargs -r kill -9; done
}
trap finish EXIT
trap 'exit 130' INT TERM

# A separate store, so that the images of this machine do not change.
store=${VERIFY_STORE:-$work/store}
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$store" "$work/run" >"$work/storage.conf"
mkdir "$work/tmp"
export CONTAINERS_STORAGE_CONF=$work/storage.conf BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp

log() { printf '%5d s  %s\n' "$SECONDS" "$*"; }
ranks() { sed -n 's/.* \([0-9]*\) rank(s)$/\1/p' "$1"; }
silent() { "$@" >"$work/command.log" 2>&1 || { tail -n 40 "$work/command.log" >&2 && return 1; }; }

base=localhost/distclip-verify-base
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    box=$(buildah from scratch)
    boxes=("$box")
    root=$(buildah mount "$box")
    silent debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
        bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    silent buildah commit --rm "$box" "$base"
    boxes=()
    log "base: Debian bookworm with python3"
fi

# A build does not see the environment and the files that configure pip and TLS. They are mounted, together with the
# local files and directories that they refer to. For a local index of pip, simple/, its parent directory is mounted.
mounts=()
mount_path() { [ ! -e "$1" ] || mounts+=(--volume "$1:${2:-$1}:ro"); }
mkdir "$work/pip"
{ echo '[global]' && env | sed -n 's/^PIP_\([A-Z_]*\)=/\1 = /p'; } >"$work/pip/pip.conf"
mount_path "$work/pip" /root/.pip
mount_path "$HOME/.config/pip" /root/.config/pip
for path in /etc/ssl/certs /etc/pip.conf /etc/xdg/pip; do mount_path "$path"; done
named=$(cat "$work/pip/pip.conf" /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null \
    | grep -oE '(^|[ =]|file://)/[^[:space:]:]+' | sed 's/^[^/]*\/*/\//; s/\/simple$//' | sort -u) || true
for path in $named ${VERIFY_MOUNTS:-}; do
    case $path in /etc/ssl/certs/* | /etc/xdg/pip/*) ;; *) mount_path "$path" ;; esac
done

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
arguments=(--build-arg "BASE=$base" --build-arg "REVISION=$revision" --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)")
[ "${1:-cpu}" != cuda ] || TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
[ -z "${TORCH_INDEX+set}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
image=localhost/distclip-verify
silent buildah bud "${arguments[@]}" "${mounts[@]}" -f "$file" -t "$image" .
size=$(buildah images --format '{{.Size}}' "$image")
log "$file: builds, $size with the base"

labels=$(buildah inspect --type image --format '{{range .OCIv1.Config.Labels}}{{println .}}{{end}}' "$image")
for value in "$revision" Apache-2.0 "$(sed -n 's/^version: //p' CITATION.cff)"; do
    grep -qx "$value" <<<"$labels" || refuse "no label of the image is $value:"$'\n'"$labels"
done

box=$(buildah from "$image")
boxes+=("$box")
run() { buildah run --hostname localhost "$@"; }
uid=$(run "$box" id -u)
[ "$uid" != 0 ] || refuse "the image runs as root. Set USER in the Dockerfile."
run "$box" sh -c 'touch outputs/mine && rm outputs/mine && test -d conf -a -d launch'
left=$(run --user root "$box" find / -xdev \( -name .git -o -path '/root/.cache/*' -o -path '/home/*/tests' \))
[ -z "$left" ] || refuse "left in the image: $left"
log "runs as uid $uid, may write outputs, has no caches and no .git"
run "$box" python -c 'import sys, distclip; assert "hydra" not in sys.modules, "distclip loads hydra"'
run "$box" python -c '
from distclip.norms.kernels.native_library import load_library
assert load_library() is not None, "no compiled kernels"
'
log "imports distclip without hydra, and with its compiled kernels"
mapfile -t cmd < <(buildah inspect --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' "$box" | sed '/^$/d')
silent run "$box" "${cmd[@]}" steps=20
log "${cmd[*]} steps=20: $(ranks "$work/command.log") ranks, exit 0"
silent run "$box" bash launch/mpirun.sh steps=5 comm=mpi
silent run "$box" bash launch/deepspeed.sh steps=5
log "launch/mpirun.sh comm=mpi and launch/deepspeed.sh: exit 0"

# Read compose.yaml with the image's Python. Without arguments, print the services. For one service, print the arguments
# of buildah run, one per line, with its volumes in $work.
compose() { # [SERVICE CONTAINER]
    run --volume "$PWD/docker:/docker:ro" "$box" python -c '
import sys, yaml
services = yaml.safe_load(open("/docker/compose.yaml"))["services"]
work, *chosen = sys.argv[1:]
if chosen:
    service = services[chosen[0]]
    print("--hostname=" + service["hostname"])
    print(*(f"--env={name}={value}" for name, value in service["environment"].items()), sep="\n")
    print(*(f"--volume={work}/{volume}" for volume in service["volumes"]), sep="\n")
    print(chosen[1], *service["command"], sep="\n")
else:
    print(*services, sep="\n")
' "$work" "$@"
}
mapfile -t nodes < <(compose)
[ "${#nodes[@]}" = 2 ] || refuse "compose.yaml must have two services, not ${nodes[*]}"
for node in "${nodes[@]}"; do
    ip netns add "distclip-$$-$node"
    spaces+=("distclip-$$-$node")
done
ip link add eth0 netns "${spaces[0]}" type veth peer name eth0 netns "${spaces[1]}"
echo '127.0.0.1 localhost' >"$work/hosts"
for i in 0 1; do
    ip -n "${spaces[i]}" addr add "10.77.0.$((i + 1))/24" dev eth0
    ip -n "${spaces[i]}" link set eth0 up
    ip -n "${spaces[i]}" link set lo up
    echo "10.77.0.$((i + 1)) ${nodes[i]}" >>"$work/hosts"
done

other=$(buildah from "$image")
boxes+=("$other")
mapfile -t first < <(compose "${nodes[0]}" "$box")
mapfile -t second < <(compose "${nodes[1]}" "$other")
for word in "${first[@]}" "${second[@]}"; do
    word=${word%:*}
    case $word in --volume=*) install -d -o "$uid" "${word#--volume=}" ;; esac
done
# buildah's chroot uses the network namespace that it is started in.
node() {
    exec timeout 600 ip netns exec "$1" buildah run --no-hosts --volume "$work/hosts:/etc/hosts:ro" "${@:2}"
}
node "${spaces[0]}" "${first[@]}" >"$work/log0" 2>&1 &
node "${spaces[1]}" "${second[@]}" >"$work/log1" 2>&1 &
for _ in "${nodes[@]}"; do
    wait -n || {
        stop
        for i in 0 1; do printf '%s\n' "--- ${nodes[i]}" && tail -n 25 "$work/log$i"; done >&2
        exit 1
    }
done
crossed=$(ip netns exec "${spaces[0]}" cat /sys/class/net/eth0/statistics/tx_bytes)
ranks=$(ranks "$work/log0")
log "compose.yaml: ${nodes[*]} exit 0; $ranks ranks, $((crossed / 1024)) KiB sent between the nodes"

# With the same ranks on one node, norms and loss must be the same.
overrides=()
for word in "${first[@]}"; do
    case $word in --*) ;; *=*) overrides+=("$word") ;; esac
done
install -d -o "$uid" "$work/one"
silent run --env "NPROC=$ranks" --volume "$work/one:/home/distclip/outputs" "$box" \
    bash launch/torchrun.sh "${overrides[@]}"
run --volume "$work/one:/volumes/one:ro" --volume "$work/outputs:/volumes/outputs:ro" "$box" python -c '
import json, math, pathlib
def figures(volume):
    run = json.loads(next(pathlib.Path("/volumes", volume).glob("*/summary.json")).read_text())
    return run["norms"] | {"held-out loss": run["held_out"], "steps": run["steps"]}
one, two = figures("one"), figures("outputs")
for name in one:
    assert math.isclose(one[name], two[name], rel_tol=1e-5), (name, one[name], two[name])
print("median norm {p50:.5g}, held-out loss {held-out loss:.5g}".format(**two))
' >"$work/figures"
log "two nodes give the same result as $ranks ranks on one node: $(cat "$work/figures")"
log "verified: $file and docker/compose.yaml"
