#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what the build, the demo and the tests need on Debian 12 (or Ubuntu), if it is not there. Needs root only
# when something is missing. Does not touch what it finds.
set -eu

PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"

missing=""
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need cc gcc
need curl curl
need git git
need ip iproute2
need ipset ipset
need make make
need nft nftables
need nsenter util-linux
need xtables-nft-multi iptables
need ping iputils-ping
# What the committed eBPF objects are compiled with; a build goes without.
case "${1:-}" in
ci | codegen)
    need clang-19 clang-19
    need llvm-strip-19 llvm-19
    ;;
esac
# aws-lc's C sources include the system's headers.
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"

# `setup.sh cluster`: also what real Kubernetes on this machine needs (tests and demo-cluster).
cluster() {
    need conntrack conntrack
    need mmdebstrap mmdebstrap
    need runc runc
    need unshare util-linux
    # Debian's is too old; the tests name the version that is needed.
    command -v go >/dev/null 2>&1 || echo "setup: Go is missing; the cluster tests need it (https://go.dev/doc/install)" >&2
}
case "${1:-}" in
ci | cluster) cluster ;;
esac

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: please install:$missing" >&2
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "setup: not root; please run: apt-get install$missing" >&2
        exit 1
    fi
    echo "setup: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: Rust is missing; install it with rustup (https://rustup.rs), version 1.95 or newer" >&2
    exit 1
fi

case "${1:-}" in
ci)
    # Kept in cargo's own folder, outside the checkout, so that it is built once a machine.
    if ! command -v cargo-deny >/dev/null 2>&1; then
        echo "setup: building cargo-deny"
        cargo install --quiet --locked cargo-deny --version 0.20.2
    fi
    ;;
esac
