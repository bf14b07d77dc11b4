// SPDX-License-Identifier: Apache-2.0
//! A state that follows another is taken by what differs, where that is little. Whatever happens, what comes of it is what
//! comes of looking at everything.

use podveil_index::{Index, Saved, Snapshot, Start, Status};
use podveil_model::{Uid, Workload};
use podveil_source::{Cluster, Endpoint, Namespace, Node, Phase, Pod, ServiceEntry, Target};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

const SEQUENCES: u64 = 40;
const STEPS: u64 = 60;
const PODS: u8 = 8;
const SERVICES: u8 = 3;

fn empty() -> Cluster {
    let text = "trustDomain: cluster.local\nnodes: [{name: n0}, {name: n1}]\nranges: {pods: [10.0.0.0/24]}";
    podveil_source::parse(1, [(std::path::Path::new("cluster.yaml"), text)]).unwrap()
}

fn pod_address(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, number).into()
}

fn pod(number: u8, version: u64) -> Pod {
    Pod {
        name: format!("pod-{number}").into(),
        namespace: format!("ns-{}", number % 2).parse().unwrap(),
        uid: Uid::from(format!("uid-{number}").as_str()),
        node_uid: None,
        node: format!("n{}", number % 2).parse().unwrap(),
        service_account: "default".parse().unwrap(),
        addresses: vec![pod_address(number)],
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        phase: Phase::Running,
        host_network: false,
        ready: true,
        owner: None,
        host_ports: BTreeMap::new(),
        probe_ports: Default::default(),
        created: 0,
        version,
        decided: version,
    }
}

fn service(number: u8) -> ServiceEntry {
    ServiceEntry {
        name: format!("service-{number}").into(),
        namespace: "ns-0".parse().unwrap(),
        addresses: vec![Ipv4Addr::new(10, 1, 0, number).into()],
        ports: Vec::new(),
        node_ports: BTreeMap::new(),
        endpoints: Vec::new(),
        publish_not_ready: false,
        balancing: Default::default(),
    }
}

fn first() -> Cluster {
    let mut cluster = empty();
    for name in ["ns-0", "ns-1"] {
        (cluster.namespaces).insert(name.parse().unwrap(), Arc::new(Namespace::default()));
    }
    cluster.pods = (0..PODS).map(|number| Arc::new(pod(number, 1))).collect();
    cluster.services = (0..SERVICES).map(|one| Arc::new(service(one))).collect();
    cluster
}

/// One thing, as it may happen in a cluster; the little ones more often.
fn step(cluster: &mut Cluster, random: &mut StdRng) {
    cluster.version += 1;
    let version = cluster.version;
    let number = random.random_range(0..PODS);
    let pods = cluster.pods.len();
    let chosen = (pods > 0).then(|| random.random_range(0..pods.max(1)));
    let chosen = chosen.and_then(|place| cluster.pods.get_mut(place));
    let which = random.random_range(0..usize::from(SERVICES));
    let service = Arc::make_mut(&mut cluster.services[which]);
    match (random.random_range(0..20), chosen) {
        (0..6, Some(pod)) => {
            let pod = Arc::make_mut(pod);
            pod.ready = !pod.ready;
            pod.version = version;
        }
        (6, Some(pod)) => {
            let pod = Arc::make_mut(pod);
            let ports = ["8080", "8080,9090", "many"].choose(random).unwrap();
            let key = podveil_source::labels::EXCLUDE_INBOUND_PORTS.to_owned();
            pod.annotations.insert(key, (*ports).to_owned());
            pod.version = version;
        }
        (7, Some(pod)) => {
            let pod = Arc::make_mut(pod);
            let phases = [Phase::Running, Phase::Terminating, Phase::Succeeded];
            pod.phase = *phases.choose(random).unwrap();
            pod.version = version;
        }
        (8, Some(pod)) => {
            // Perhaps another's, or a service's.
            let pod = Arc::make_mut(pod);
            let second = random.random_range(0..2);
            pod.addresses = vec![Ipv4Addr::new(10, second, 0, number).into()];
            pod.version = version;
        }
        (9, Some(_)) => drop(cluster.pods.remove(random.random_range(0..pods))),
        (10, _) => {
            if !cluster.pods.iter().any(|one| one.uid == pod(number, 1).uid) {
                cluster.pods.push(Arc::new(pod(number, version)));
                cluster.pods.sort_by(|one, other| one.uid.cmp(&other.uid));
            }
        }
        (11, _) => {
            let name = format!("ns-{}", number % 2).parse().unwrap();
            let namespace = cluster.namespaces.get_mut(&name).unwrap();
            let namespace = Arc::make_mut(namespace);
            let value = ["true", "false"].choose(random).unwrap();
            let key = podveil_source::labels::ENROL.to_owned();
            namespace.labels.insert(key, (*value).to_owned());
            (namespace.version, namespace.decided) = (version, version);
        }
        (12, _) => service.addresses = vec![Ipv4Addr::new(10, 1, 0, number).into()],
        (13, _) => {
            let targets = [
                Target::Address(Ipv4Addr::new(10, 9, 0, number).into()),
                Target::Name(format!("pod-{}", number / 2 * 2).into()),
            ];
            let target = targets.choose(random).unwrap().clone();
            toggle(service, target, 1);
        }
        (other, _) => {
            let target = Target::Pod(Uid::from(format!("uid-{number}").as_str()));
            toggle(service, target, other);
        }
    }
}

/// Behind it or not; where it is already, perhaps with another port.
fn toggle(service: &mut ServiceEntry, target: Target, port: u16) {
    let place = (service.endpoints.iter()).position(|endpoint| endpoint.target == target);
    let ports = BTreeMap::from([(80, 8000 + port % 2)]);
    match place {
        Some(place) if service.endpoints[place].ports == ports => {
            service.endpoints.remove(place);
        }
        Some(place) => service.endpoints[place].ports = ports,
        None => service.endpoints.push(Endpoint { target, ports }),
    }
}

struct Followed {
    index: Index,
    now: Instant,
    number: u64,
    last: Option<Snapshot>,
}

impl Followed {
    fn new(now: Instant) -> Self {
        Self {
            index: Index::new(Saved::default(), Start::AtOnce),
            now,
            number: 0,
            last: None,
        }
    }

    fn apply(&mut self, cluster: &Cluster) {
        self.index.apply(self.now, &Arc::new(cluster.clone()));
        while let Some(snapshot) = self.index.poll(self.now) {
            self.number += 1;
            self.index.published(self.number);
            self.last = Some(snapshot);
        }
    }

    fn last(&self) -> &Snapshot {
        self.last.as_ref().expect("the first state is news")
    }

    fn workloads(&self) -> Vec<Workload> {
        let workloads = self.last().workloads.iter();
        workloads.map(|one| Workload::clone(one)).collect()
    }

    fn told(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let Status {
            conditions,
            workloads,
            ..
        } = self.index.status(self.now);
        let of_workloads = workloads.into_iter().map(|one| one.conditions).collect();
        (conditions, of_workloads)
    }
}

#[test]
fn what_comes_of_a_difference_is_what_comes_of_looking_at_everything() {
    let now = Instant::now();
    for seed in 0..SEQUENCES {
        let mut random = StdRng::seed_from_u64(seed);
        let mut cluster = first();
        let (mut followed, mut whole) = (Followed::new(now), Followed::new(now));
        for number in 0..STEPS {
            step(&mut cluster, &mut random);
            followed.apply(&cluster);
            // Another node comes and goes: nobody can go by what little differs.
            let mut other = cluster.clone();
            let passing = format!("passing-{}", number % 2).parse().unwrap();
            other.nodes.insert(passing, Node::default());
            whole.apply(&other);
            whole.apply(&cluster);
            let context = format!("sequence {seed}, step {number}");
            assert_eq!(followed.workloads(), whole.workloads(), "{context}");
            assert_eq!(followed.last().services, whole.last().services, "{context}");
            assert_eq!(followed.told(), whole.told(), "{context}");
            let outlying = |followed: &Followed| followed.last().mesh.outlying.clone();
            assert_eq!(outlying(&followed), outlying(&whole), "{context}");
        }
    }
}
