# SPDX-License-Identifier: Apache-2.0
# One line for each thing that a node program can leave on a node: in the node's own network namespace and in every pod's
# the rules, routes, links' programs, listeners and settings; then cgroup folders, pins and files.
#   $1 how the cgroup folders of this cluster begin
for netns in /proc/1/ns/net /run/netns/*; do
    [ -e "$netns" ] || continue
    nsenter --net="$netns" sh -c '
        # kube-proxy clears its own chains away in its own time.
        nft list tables | grep -v kube-proxy | while read -r _ table; do
            nft --stateless list table $table
        done | tr "," "\n" | sed "s/^[[:space:]]*//; s/[[:space:]]*$//; s/^/nft: /"
        for family in -4 -6; do
            ip $family rule | sed "s/^/ip $family rule: /"
            ip $family route show table all | sed "s/ expires .*//; s/^/ip $family route: /"
        done
        ip -details link | grep -o -E "^[0-9]+: [^:]*|(prog/xdp|tcx/|netkit).*" | sed "s/^/link: /"
        tc qdisc | sed "s/^/tc: /"
        ss --no-header --listening --numeric --tcp --udp | awk "{ print \"listens: \" \$1, \$5 }"
        find /proc/sys/net -type f ! -name nf_conntrack_count ! -name stable_secret ! -name flush -print0 |
            xargs -0 grep -s . /dev/null | sed "s/^/sysctl: /"
    ' | sort -u | sed "s|^|$netns: |"
done
find /sys/fs/bpf -mindepth 1 | sed 's/^/pin: /'
find /sys/fs/cgroup -maxdepth 2 -type d -name "$1*" | sed 's/^/cgroup: /'
find /etc /opt /run /var/lib \( -path /var/lib/kubelet -o -path /var/lib/containerd -o -path /run/containerd \) -prune \
    -o -name '*podveil*' -print | sed 's/^/file: /'
grep -s . /etc/cni/net.d/* /etc/cni/net.d/.[!.]* | sed 's/^/cni: /'
ls -A /opt/cni/bin | sed 's/^/cni plugin: /'
exit 0
