// SPDX-License-Identifier: Apache-2.0
use super::{Malformed, Parsed, at_most, workload};
use ipnet::IpNet;
use podveil_model::MeshConfig;
use podveil_proto::podveil::node::v1 as wire;

const MAX_RANGES: usize = 4096;

impl TryFrom<wire::MeshConfig> for Parsed<MeshConfig> {
    type Error = Malformed;

    fn try_from(wire: wire::MeshConfig) -> Result<Self, Malformed> {
        Ok(Self(MeshConfig {
            trust_domain: workload::trust_domain("trust_domain", &wire.trust_domain)?,
            pod_ranges: ranges("pod_ranges", wire.pod_ranges)?,
            service_ranges: ranges("service_ranges", wire.service_ranges)?,
            ranges_known: wire.ranges_known,
            plain_outbound_ranges: ranges("plain_outbound_ranges", wire.plain_outbound_ranges)?,
            epoch: workload::epoch(wire.epoch),
        }))
    }
}

fn ranges(field: &'static str, values: Vec<String>) -> Result<Vec<IpNet>, Malformed> {
    at_most(MAX_RANGES, field, values)?
        .into_iter()
        .map(|value| {
            value.parse().map_err(|_| Malformed::BadCidr {
                field,
                value: super::shortened(&value),
            })
        })
        .collect()
}
