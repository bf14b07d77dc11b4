// SPDX-License-Identifier: Apache-2.0
#![no_main]

use libfuzzer_sys::fuzz_target;
use podveil_cni::wire::{Answer, Request};
use podveil_cni::{Arguments, ConfList, Config, Settings};

// Whatever a runtime writes, a list holds and the node program says.
fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = Config::parse(bytes) {
        let _read = config.addresses();
    }
    let _read = (Request::decode(bytes), Answer::decode(bytes));
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let _read = Arguments::parse(text);
    let settings = Settings {
        socket: "/s".into(),
        fail_closed: true,
        exempt_namespaces: vec![],
    };
    let list = ConfList::new(text);
    if let (Ok(with), false) = (list.with(&settings), list.is_with()) {
        let without = ConfList::new(&with).without().expect("it was a list");
        let parse = |text| serde_json::from_str::<serde_json::Value>(text).expect("it was JSON");
        assert_eq!(parse(&without), parse(text));
    }
});
