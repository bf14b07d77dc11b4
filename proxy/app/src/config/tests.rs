// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::collections::BTreeMap;

/// A file of its own for each text, removed at the end.
fn load(text: &str, variables: &[(&str, &str)]) -> Result<NodeConfig, String> {
    let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
    let file = std::env::temp_dir().join(format!(
        "podveil-node-config-{}-{:?}.yaml",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&file, text).unwrap();
    let config = NodeConfig::load(Some(&file), &variables);
    std::fs::remove_file(&file).unwrap();
    config.map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    })
}

#[test]
fn a_node_name_is_enough() {
    let config = load("node: n1\n", &[]).unwrap();
    assert_eq!(config.module().unwrap(), Module::Proxy);
    assert_eq!(config.proxy.hold_bound.0, Duration::from_secs(5));
    assert_eq!(
        config.holder(),
        Some(Path::new("/var/run/podveil/listeners.sock"))
    );
}

#[test]
fn a_cgroup_of_ones_own_is_what_the_file_says() {
    let config = load("node: n1\ncgroup: mine\n", &[]).unwrap();
    let expected = Membership::Folder("mine".to_owned());
    assert_eq!(config.cgroup().unwrap(), expected);
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let error = load("node: n1\nproxy:\n  hold_bond: 5s\n", &[]).unwrap_err();
    assert!(
        error.contains("hold_bond") && error.contains('3'),
        "{error}"
    );
}

#[test]
fn a_peers_key_is_answered_with_our_name() {
    let error = load("node: n1\ndiscoveryAddress: istiod:15012\n", &[]).unwrap_err();
    assert!(
        error.ends_with("the key discoveryAddress is now called xds_address"),
        "{error}"
    );
}

#[test]
fn proxy_and_redirect_together_are_refused() {
    let error = load("node: n1\nmodules: [proxy, redirect]\n", &[]).unwrap_err();
    assert!(error.contains("never share a process"), "{error}");
    assert!(load("node: n1\nmodules: []\n", &[]).is_err());
}

#[test]
fn what_is_in_use_cannot_be_set_to_be_forgotten() {
    let error = load("node: n1\nproxy: {forget_after: 0s}\n", &[]).unwrap_err();
    assert!(error.contains("proxy.forget_after: at least 1s"), "{error}");
    assert!(load("node: n1\nproxy: {forget_after: 1s}\n", &[]).is_ok());
}

#[test]
fn the_names_that_peers_charts_set_are_taken() {
    let variables = [
        ("NODE_NAME", "n2"),
        ("XDS_ADDRESS", "https://istiod.istio-system.svc:15012"),
        ("CA_ADDRESS", "https://istiod.istio-system.svc:15012"),
        ("INPOD_UDS", "/var/run/cilium/ztunnel.sock"),
        ("LOG_FORMAT", "json"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("ZTUNNEL_WORKER_THREADS", "0"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "50"),
    ];
    let config = load("node: n1\nlisteners_socket: \"\"\n", &variables).unwrap();
    assert_eq!(config.node.as_str(), "n2");
    assert_eq!(config.xds_address.as_str(), "istiod.istio-system.svc:15012");
    assert_eq!(config.zds_socket, Path::new("/var/run/cilium/ztunnel.sock"));
    assert_eq!(config.log, LogFormat::Json);
    assert_eq!(config.proxy.drain_bound.0, Duration::from_secs(25));
    assert_eq!(config.worker_threads, None);
    assert_eq!(config.proxy.max_streams_per_tunnel, 50);
    assert_eq!(config.holder(), None);
}

#[test]
fn a_share_of_the_cpus_is_a_number_of_threads() {
    let config = load("node: n1\n", &[("ZTUNNEL_WORKER_THREADS", "100%")]).unwrap();
    let available = std::thread::available_parallelism().unwrap().get();
    assert_eq!(config.worker_threads, Some(available));
    assert!(load("node: n1\n", &[("ZTUNNEL_WORKER_THREADS", "many")]).is_err());
}

#[test]
fn a_stated_deadline_goes_before_a_derived_one() {
    let variables = [
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("CONNECTION_TERMINATION_DEADLINE", "7s"),
    ];
    let config = load("node: n1\n", &variables).unwrap();
    assert_eq!(config.proxy.drain_bound.0, Duration::from_secs(7));
}

#[test]
fn every_key_says_what_it_means() {
    let schema = serde_json::to_value(schemars::schema_for!(NodeConfig)).unwrap();
    let mut places = vec![schema["properties"].clone()];
    places.extend(
        ["RedirectSection", "ProxySection"].map(|name| schema["$defs"][name]["properties"].clone()),
    );
    for place in places {
        for (key, property) in place.as_object().unwrap() {
            let described = property["description"].is_string();
            assert!(described, "{key} has no description");
        }
    }
}

#[test]
fn what_is_dumped_is_read_back() {
    let config = load("node: n1\n", &[]).unwrap();
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(load(&text, &[]).unwrap().xds_address, config.xds_address);
}
