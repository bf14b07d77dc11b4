// SPDX-License-Identifier: Apache-2.0
//! Everything a control plane can send is parsed or refused. Its cases without a corpus are in
//! `tests/parse.rs`, `any_bytes_are_parsed_or_refused`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use podveil_xds_client::parse;

fuzz_target!(|bytes: &[u8]| {
    let _ = parse::response(bytes);
    if let Ok(address) = parse::address("uid-1", bytes) {
        assert_eq!(&*address.resource_name(), "uid-1");
    }
    let refused = parse::authorization(bytes).is_err();
    if refused && let Some(policy) = parse::refuse_all("shop/p", bytes) {
        // Whatever stands in for a refused policy must not let anybody pass.
        let allows = policy.action == podveil_policy::Action::Allow && !policy.rules.is_empty();
        assert!(!allows);
    }
    let _ = parse::mesh_config(bytes);
});
