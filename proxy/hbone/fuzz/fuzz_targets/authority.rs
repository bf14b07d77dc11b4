// SPDX-License-Identifier: Apache-2.0
//! The CONNECT target: what is taken is written and parsed again to the same. Its cases without a corpus are in `testdata/`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| podveil_hbone::fuzz::authority(data));
