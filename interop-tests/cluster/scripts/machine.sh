# SPDX-License-Identifier: Apache-2.0
# The first process of a machine, in new mount, network and PID namespaces: gives it folders of its own, so that it writes
# nowhere else, then waits for ever. When it ends the kernel ends every process and mount of the machine.
set -eu
name=$1 folder=$2

# Everything that a node's programs write to is memory of this machine.
for own in /run /var/lib /var/log /opt; do
    mount -t tmpfs -o mode=755 tmpfs "$own"
done
mkdir -p /run/etc/upper /run/etc/work /run/netns /run/kernel
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
rm -rf /etc/cni
mkdir -p /etc/cni/net.d /opt/cni/bin /var/log/pods
echo "$name" >/etc/hostname
: >/etc/resolv.conf
mount -t bpf bpf /sys/fs/bpf

# A kubelet sets these for the whole kernel, which is not this machine's alone: it may have copies.
for tunable in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    copy=/run/kernel/$(echo "$tunable" | tr / _)
    cat "/proc/sys/$tunable" >"$copy"
    mount --bind "$copy" "/proc/sys/$tunable"
done

# Pods may ask for mounts that propagate.
mount --make-rshared /
touch "$folder/$name.ready"
# A shell reaps whatever is left to it.
while :; do
    sleep 86400 &
    wait
done
