# SPDX-License-Identifier: Apache-2.0
# Waits until standard input ends, which it does when the owner of a cluster is gone, however it went. By then the kernel
# has ended the machines; what is left are cgroup folders and the folder of the cluster.
#   $1 the cluster's folder, $2 how its cgroup folders begin, and the name of its link on this host
folder=$1 prefix=$2
cat >/dev/null
# The kernel takes it away some time after the namespace of its other end.
ip link delete "$prefix" 2>/dev/null
tries=0
while :; do
    left=
    for root in /sys/fs/cgroup /sys/fs/cgroup/*; do
        for cgroup in "$root/$prefix"-*; do
            [ -d "$cgroup" ] || continue
            find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
            [ ! -d "$cgroup" ] || left="$left $cgroup"
        done
    done
    [ -n "$left" ] || break
    tries=$((tries + 1))
    if [ "$tries" -gt 200 ]; then
        echo "cgroups are left:$left" >&2
        exit 1
    fi
    sleep 0.05
done
rm -rf "$folder"
