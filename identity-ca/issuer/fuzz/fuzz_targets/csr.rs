// SPDX-License-Identifier: Apache-2.0
//! A certificate signing request from a program: refused, or a key of the policy.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = podveil_ca_issuer::Csr::from_der(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = podveil_ca_issuer::Csr::from_pem(text);
    }
});
