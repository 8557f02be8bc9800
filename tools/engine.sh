#!/usr/bin/env bash
# A Docker engine for the tests in tests/container, on a Debian machine that has none.
#
#   DOCKER_HOST=$(tools/engine.sh up)       the engine that answers already, or else one of our own
#   DOCKER_HOST=$(tools/engine.sh up gpu)   always one of our own, which accepts `--gpus` without a GPU
#   tools/engine.sh status                  what runs
#   tools/engine.sh down                    stops our own engines; their images stay for the next `up`
#
# `up` can be repeated. Only DOCKER_HOST goes to stdout. Where no registry can be reached, `up`
# also makes a stand-in for the base image from Debian's packages. SMOLQUANT_ENGINE_DIR moves the data.
set -euo pipefail

BASE_IMAGE=debian:bookworm-slim
ARGUMENTS=("$@")
STATE=${SMOLQUANT_ENGINE_DIR:-/var/lib/smolquant-engine}

say() { printf 'engine: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

socket() { echo "$STATE/$1/docker.sock"; }
answers() { DOCKER_HOST=$1 timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# The endpoint the docker client uses when nobody tells it otherwise.
default_host() {
    echo "${DOCKER_HOST:-$(docker context inspect --format '{{.Endpoints.docker.Host}}')}"
}

need_root() {
    [[ $(id -u) == 0 ]] || exec sudo -n SMOLQUANT_ENGINE_DIR="$STATE" "$0" "${ARGUMENTS[@]}"
}

need_packages() {
    local missing=() program
    for program in "$@"; do
        command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
    done
    ((${#missing[@]})) || return 0
    need_root
    command -v apt-get >/dev/null || fail "start Docker first: without apt-get it cannot be installed here"
    say "installing ${missing[*]}"
    {
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    } >&2
}

# Two engines on one machine must share neither bridge nor containerd namespace, and only one may own
# the firewall's chains: the gpu engine's containers reach this machine, not the network behind it.
network_flags() {
    [[ $1 == gpu ]] || return 0
    ip link show smolquant-gpu >/dev/null 2>&1 || ip link add smolquant-gpu type bridge
    ip addr replace 172.30.251.1/24 dev smolquant-gpu
    ip link set smolquant-gpu up
    echo --bridge=smolquant-gpu --iptables=false
}

# dockerd believes in a GPU when it finds NVIDIA's hook as it starts, and runs the hook per container.
gpu_stub() {
    mkdir -p "$STATE/gpu/bin"
    printf '#!/bin/sh\nexit 0\n' >"$STATE/gpu/bin/nvidia-container-runtime-hook"
    chmod +x "$STATE/gpu/bin/nvidia-container-runtime-hook"
    echo "$STATE/gpu/bin"
}

start() {
    local name=$1 home=$STATE/$1 path=$PATH flags
    need_root
    need_packages dockerd:docker.io iptables:iptables ip:iproute2
    mkdir -p "$home"
    stop "$name"
    if [[ $name == gpu ]]; then path=$(gpu_stub):$PATH; fi
    read -ra flags <<<"$(network_flags "$name")"
    say "starting dockerd ($name), log in $home/dockerd.log"
    PATH=$path setsid dockerd --data-root "$home/data" --exec-root "$home/exec" --pidfile "$home/pid" \
        --host "unix://$(socket "$name")" --storage-driver overlay2 \
        --containerd-namespace "smolquant-$name" --containerd-plugins-namespace "smolquant-plugins-$name" \
        "${flags[@]}" >"$home/dockerd.log" 2>&1 </dev/null &
    for _ in {1..60}; do
        if answers "unix://$(socket "$name")"; then return; fi
        sleep 0.5
    done
    tail -n 20 "$home/dockerd.log" >&2
    fail "dockerd ($name) does not answer"
}

stop() {
    local pidfile=$STATE/$1/pid pid
    [[ -f $pidfile ]] || return 0
    pid=$(cat "$pidfile")
    # After a reboot the number may belong to another program.
    if [[ $(cat "/proc/$pid/comm" 2>/dev/null) == dockerd ]]; then
        kill "$pid"
        while [[ -d /proc/$pid ]]; do sleep 0.2; done
    fi
    rm -f "$pidfile"
}

pip_setting() { # the first value pip itself would take: environment before files
    python3 -m pip config list | sed -nE "s/^[^ ]*\.$1='(.*)'\$/\1/p" | head -n 1
}

# The image a build starts from, with what a build here needs to reach its packages: this machine's
# certificates and pip's configuration, wheels in a local folder included.
stand_in() {
    local root links index mirror
    need_packages debootstrap:debootstrap
    root=$(mktemp -d -p "$STATE")
    mirror=$(apt-get indextargets --format "\$(CODENAME) \$(SITE)" "Created-By: Packages" |
        sed -n 's/^bookworm //p' | head -n 1)
    say "no registry answers: making $BASE_IMAGE from ${mirror:-Debian}'s packages"
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" ${mirror:+"$mirror"} \
        >"$STATE/debootstrap.log" || fail "debootstrap failed, see $STATE/debootstrap.log"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*

    cp /etc/ssl/certs/ca-certificates.crt "$root/usr/local/share/ca-certificates/machine.crt"
    chroot "$root" update-ca-certificates >&2
    links=$(pip_setting find-links)
    index=$(pip_setting index-url)
    {
        echo "[global]"
        echo "cert = /etc/ssl/certs/ca-certificates.crt"
        if [[ $index == http* ]]; then echo "index-url = $index"; fi
        if [[ -n $links ]]; then echo "find-links = $links"; fi
    } >"$root/etc/pip.conf"
    if [[ -d $links ]]; then
        mkdir -p "$root/$links"
        cp "$links"/*.whl "$root/$links/"
    fi
    tar -C "$root" -c . | docker import --change 'CMD ["bash"]' - "$BASE_IMAGE" >/dev/null
    rm -rf "$root"
}

up() {
    local name=$1 host
    need_packages docker:docker.io
    if [[ $name == plain ]] && host=$(default_host) && answers "$host"; then
        say "using the engine at $host"
    else
        host=unix://$(socket "$name")
        answers "$host" || start "$name"
    fi
    export DOCKER_HOST=$host
    # The gpu engine is handed finished images; only the plain one builds.
    if [[ $name == plain ]] && ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
        docker pull --quiet "$BASE_IMAGE" >&2 || stand_in
    fi
    echo "$host"
}

status() {
    local name
    for name in plain gpu; do
        if answers "unix://$(socket "$name")"; then
            echo "$name: DOCKER_HOST=unix://$(socket "$name")"
        else
            echo "$name: down"
        fi
    done
}

name=${2:-plain}
[[ $name == plain || $name == gpu ]] || fail "no engine '$name': plain or gpu"
case ${1:-} in
    up) up "$name" ;;
    down) stop plain && stop gpu ;;
    status) status ;;
    *) fail "usage: engine.sh up [plain|gpu] | down | status" ;;
esac
