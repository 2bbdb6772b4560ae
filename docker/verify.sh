#!/usr/bin/env bash
# Without a Docker engine: build an image, use it, and play compose.yaml. bash docker/verify.sh [cpu|cuda]
# As root on Debian or Ubuntu, with buildah, debootstrap and iproute2; takes 10 GB in ${TMPDIR:-/var/tmp} and some ten
# minutes. The base is a Debian of debootstrap's; cuda.Dockerfile gets torch for CPUs on it: all but FROM is run.
#   MIRROR         of Debian
#   TORCH_INDEX    the index torch comes from, or empty: from wherever pip is told to look
#   VERIFY_MOUNTS  directories to lend to the build, beside those that pip's settings on this machine name
#   VERIFY_STORE   a directory to keep base and image in; without it nothing stays
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=docker/${1:-cpu}.Dockerfile
refuse() { echo "verify.sh: $*" >&2 && exit 1; }
[ -f "$file" ] || refuse "there is no $file: write cpu or cuda"
[ "$(id -u)" = 0 ] || refuse "only root makes chroots and network namespaces"
for tool in buildah debootstrap ip; do
    command -v "$tool" >/dev/null || refuse "no $tool: apt-get install buildah debootstrap iproute2"
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

# A store of its own: nothing of the machine's is touched.
store=${VERIFY_STORE:-$work/store}
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$store" "$work/run" >"$work/storage.conf"
mkdir "$work/tmp"
export CONTAINERS_STORAGE_CONF=$work/storage.conf BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }
ranks() { sed -n 's/.* \([0-9]*\) rank(s)$/\1/p' "$1"; }
quietly() { "$@" >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2 && return 1; }; }

base=localhost/distclip-verify-base
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    box=$(buildah from scratch)
    boxes=("$box")
    root=$(buildah mount "$box")
    quietly debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
        bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    quietly buildah commit --rm "$box" "$base"
    boxes=()
    say "base: Debian bookworm with python3"
fi

# A build sees neither the environment nor the files that tell pip and TLS where to look: it is lent them, and the local
# files and directories that they name; an index of pip's, simple/, with what lies beside it.
lent=()
lend() { [ ! -e "$1" ] || lent+=(--volume "$1:${2:-$1}:ro"); }
mkdir "$work/pip"
{ echo '[global]' && env | sed -n 's/^PIP_\([A-Z_]*\)=/\1 = /p'; } >"$work/pip/pip.conf"
lend "$work/pip" /root/.pip
lend "$HOME/.config/pip" /root/.config/pip
for path in /etc/ssl/certs /etc/pip.conf /etc/xdg/pip; do lend "$path"; done
named=$(cat "$work/pip/pip.conf" /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null \
    | grep -oE '(^|[ =]|file://)/[^[:space:]:]+' | sed 's/^[^/]*\/*/\//; s/\/simple$//' | sort -u) || true
for path in $named ${VERIFY_MOUNTS:-}; do
    case $path in /etc/ssl/certs/* | /etc/xdg/pip/*) ;; *) lend "$path" ;; esac
done

arguments=(--build-arg "BASE=$base")
[ "${1:-cpu}" != cuda ] || TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
[ -z "${TORCH_INDEX+set}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
image=localhost/distclip-verify
quietly buildah bud "${arguments[@]}" "${lent[@]}" -f "$file" -t "$image" .
size=$(buildah images --format '{{.Size}}' "$image")
say "$file: builds, $size with the base"

box=$(buildah from "$image")
boxes+=("$box")
run() { buildah run --hostname localhost "$@"; }
uid=$(run "$box" id -u)
[ "$uid" != 0 ] || refuse "the image runs as root"
run "$box" sh -c 'touch outputs/mine && rm outputs/mine && test -d conf -a -d launch'
left=$(run --user root "$box" find / -xdev \( -name .git -o -path '/root/.cache/*' -o -path '/home/*/tests' \))
[ -z "$left" ] || refuse "left in the image: $left"
say "runs as uid $uid, may write outputs, has no caches and no .git"
run "$box" python -c 'import sys, distclip; assert "hydra" not in sys.modules, "distclip loads hydra"'
run "$box" python -c 'from distclip.norms.kernels.native_library import load_library; assert load_library() is not None, "no compiled kernels"'
say "imports distclip without hydra, and with its compiled kernels"
mapfile -t cmd < <(buildah inspect --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' "$box" | sed '/^$/d')
quietly run "$box" "${cmd[@]}" steps=20
say "${cmd[*]} steps=20: $(ranks "$work/log") ranks, exit 0"
quietly run "$box" bash launch/mpirun.sh steps=5 comm=mpi
quietly run "$box" bash launch/deepspeed.sh steps=5
say "launch/mpirun.sh comm=mpi and launch/deepspeed.sh: exit 0"

# compose.yaml is read by the image's Python: the services; or, for one of them, what buildah run is to be told, its
# volumes in $work; a word a line.
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
[ "${#nodes[@]}" = 2 ] || refuse "one cable joins two services, not ${nodes[*]}"
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
# buildah's chroot stays in the network that it is started in.
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
say "compose.yaml: ${nodes[*]} exit 0; $ranks ranks, $((crossed / 1024)) KiB went from one node to the other"

# The same ranks on one node: the same norms and the same loss.
overrides=()
for word in "${first[@]}"; do
    case $word in --*) ;; *=*) overrides+=("$word") ;; esac
done
install -d -o "$uid" "$work/one"
quietly run --env "NPROC=$ranks" --volume "$work/one:/home/distclip/outputs" "$box" \
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
say "the same on two nodes as with all $ranks ranks on one: $(cat "$work/figures")"
say "verified: $file and docker/compose.yaml"
