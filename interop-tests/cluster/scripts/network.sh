# SPDX-License-Identifier: Apache-2.0
# The wire between the machines: a bridge at the control plane, a link to each node and one to this host.
#   $1 control plane's first process, $2 and $3 the nodes', $4 number of the cluster, $5 name of the host's link
set -eu
control=$1 first=$2 second=$3 number=$4 link=$5
v4=172.29.$number v6=fd00:29:$number:

at() {
    target=$1
    shift
    nsenter --target "$target" --net -- "$@"
}

# forwards <process>: it routes between its links, and no address waits for duplicates that cannot be.
forwards() {
    at "$1" sh -ec '
        echo 1 >/proc/sys/net/ipv4/ip_forward
        echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
        for conf in all default; do echo 0 >/proc/sys/net/ipv6/conf/$conf/accept_dad; done
        ip link set lo up'
}

forwards "$control"
at "$control" ip -batch - <<EOF
link add br0 type bridge
addr add $v4.1/24 dev br0
addr add ${v6}:1/64 dev br0 nodad
link set br0 up
EOF
ip link add "$link" type veth peer name host netns "$control"
echo 0 >"/proc/sys/net/ipv6/conf/$link/accept_dad"
ip addr add "$v4.254/24" dev "$link"
ip addr add "${v6}:254/64" dev "$link" nodad
ip link set "$link" up
at "$control" ip link set host master br0 up

index=0
for node in "$first" "$second"; do
    index=$((index + 1))
    forwards "$node"
    ip link add eth0 netns "$node" type veth peer name "node-$index" netns "$control"
    at "$control" ip link set "node-$index" master br0 up
    at "$node" ip -batch - <<EOF
addr add $v4.1$index/24 dev eth0
addr add ${v6}:1$index/64 dev eth0 nodad
link set eth0 up
route add default via $v4.1
route add default via ${v6}:1
EOF
done

# route <process> <index of the node that the pods are on>
route() {
    at "$1" ip -batch - <<EOF
route add 10.244.$((4 * $2)).0/22 via $v4.1$2
route add fd00:10:244:$2::/64 via ${v6}:1$2
EOF
}
route "$control" 1
route "$control" 2
route "$first" 2
route "$second" 1
