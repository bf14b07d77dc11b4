// SPDX-License-Identifier: Apache-2.0
use crate::Sandbox;
use crate::command::{ip_batch, run};
use podveil_netns::NetNs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where nodes find the CA and the controller.
pub const CONTROL_PLANE_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 10, 1);

/// A node's namespace.
#[derive(Debug)]
pub struct NodeNet {
    /// As the cluster calls it: `n1`.
    pub name: String,
    pub namespace: String,
    pub netns: NetNs,
    pub address: Ipv4Addr,
    index: u8,
}

/// A pod's namespace. Its name is also the workload's UID, so that the node program finds it by name.
#[derive(Debug)]
pub struct PodNet {
    pub namespace: String,
    pub netns: NetNs,
    /// IPv4, then IPv6.
    pub addresses: [IpAddr; 2],
    /// The link's name in the node's namespace.
    pub link: String,
}

impl PodNet {
    pub fn v4(&self) -> IpAddr {
        self.addresses[0]
    }

    pub fn v6(&self) -> IpAddr {
        self.addresses[1]
    }
}

/// Two nodes, the wire between them, and a namespace for the control plane.
#[derive(Debug)]
pub struct Topology {
    pub nodes: [NodeNet; 2],
    /// Namespace of the CA and the controller.
    pub control_plane: (String, NetNs),
}

impl Topology {
    /// # Errors
    /// If a namespace or link cannot be made.
    pub fn new(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let node = |index: u8| -> anyhow::Result<NodeNet> {
            let name = format!("n{index}");
            let (namespace, netns) = sandbox.add_netns(&name)?;
            without_dad(&namespace)?;
            Ok(NodeNet {
                name,
                namespace,
                netns,
                address: Ipv4Addr::new(172, 31, 0, index),
                index,
            })
        };
        let nodes = [node(1)?, node(2)?];
        let control_plane = sandbox.add_netns("cp")?;
        let [one, two] = &nodes;
        run(
            "ip",
            [
                "link",
                "add",
                "wire",
                "netns",
                &one.namespace,
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                &two.namespace,
            ],
        )?;
        for node in &nodes {
            let link = node.name.as_str();
            run(
                "ip",
                [
                    "link",
                    "add",
                    "cp",
                    "netns",
                    &node.namespace,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    link,
                    "netns",
                    &control_plane.0,
                ],
            )?;
        }
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("addr add {CONTROL_PLANE_ADDRESS}/32 dev lo"),
        ];
        for node in &nodes {
            lines.push(format!(
                "addr add 172.31.1{}.1/30 dev {}",
                node.index, node.name
            ));
            lines.push(format!("link set {} up", node.name));
            lines.push(format!(
                "route add {}/32 via 172.31.1{}.2",
                node.address, node.index
            ));
        }
        ip_batch(&control_plane.0, &lines)?;
        for (node, other) in [(one, two), (two, one)] {
            node.set_up(other)?;
        }
        Ok(Self {
            nodes,
            control_plane,
        })
    }
}

impl NodeNet {
    fn set_up(&self, other: &NodeNet) -> anyhow::Result<()> {
        let (me, them) = (self.index, other.index);
        ip_batch(
            &self.namespace,
            &[
                "link set lo up".into(),
                format!("addr add {}/24 dev wire", self.address),
                format!("addr add fd00:31::{me}/64 dev wire nodad"),
                "link set wire up".into(),
                format!("addr add 172.31.1{me}.2/30 dev cp"),
                "link set cp up".into(),
                format!("route add {CONTROL_PLANE_ADDRESS}/32 via 172.31.1{me}.1"),
                // The pods' gateway; each pod's link answers for it.
                format!("addr add 10.244.{me}.1/32 dev lo"),
                format!("route add 10.244.{them}.0/24 via {}", other.address),
                format!("route add fd00:10:244:{them}::/64 via fd00:31::{them}"),
            ],
        )?;
        let netns = format!("--net=/run/netns/{}", self.namespace);
        let forward =
            "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding";
        run("nsenter", [&netns, "sh", "-c", forward]).map(drop)
    }

    /// Makes a pod's namespace, joined to this node. `number` (10..=250) is unique on the node.
    ///
    /// # Errors
    /// If the namespace or the link cannot be made.
    pub fn add_pod(&self, sandbox: &Sandbox, name: &str, number: u8) -> anyhow::Result<PodNet> {
        let (namespace, netns) = sandbox.add_netns(name)?;
        without_dad(&namespace)?;
        let link = format!("pod{number}");
        run(
            "ip",
            [
                "link",
                "add",
                &link,
                "netns",
                &self.namespace,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &namespace,
            ],
        )?;
        let index = self.index;
        let (v4, v6) = (
            Ipv4Addr::new(10, 244, index, number),
            Ipv6Addr::new(
                0xfd00,
                0x10,
                0x244,
                u16::from(index),
                0,
                0,
                0,
                u16::from(number),
            ),
        );
        ip_batch(
            &namespace,
            &[
                "link set lo up".into(),
                format!("addr add {v4}/32 dev eth0"),
                format!("addr add {v6}/128 dev eth0 nodad"),
                "link set eth0 up".into(),
                format!("route add 10.244.{index}.1/32 dev eth0"),
                format!("route add default via 10.244.{index}.1"),
                "route add default via fe80::1 dev eth0".into(),
            ],
        )?;
        ip_batch(
            &self.namespace,
            &[
                format!("addr add fe80::1/64 dev {link} nodad"),
                format!("link set {link} up"),
                format!("route add {v4}/32 dev {link}"),
                format!("route add {v6}/128 dev {link}"),
            ],
        )?;
        Ok(PodNet {
            namespace,
            netns,
            addresses: [v4.into(), v6.into()],
            link,
        })
    }
}

/// Link-local addresses are usable at once; nobody else is on these links.
fn without_dad(namespace: &str) -> anyhow::Result<()> {
    let netns = format!("--net=/run/netns/{namespace}");
    run(
        "nsenter",
        [
            &netns,
            "sh",
            "-c",
            "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad",
        ],
    )
    .map(drop)
}
