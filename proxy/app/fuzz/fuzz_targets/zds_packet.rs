// SPDX-License-Identifier: Apache-2.0
//! Packets of the agent, in any order, without descriptors.
#![no_main]

use libfuzzer_sys::fuzz_target;

use podveil_netns::seqpacket::Packet;
use podveil_node::zds::Session;

fuzz_target!(|packets: Vec<Vec<u8>>| {
    let mut session = Session::default();
    for bytes in packets {
        let _ = session.receive(Packet { bytes, fds: Vec::new() });
    }
});
