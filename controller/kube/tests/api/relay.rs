// SPDX-License-Identifier: Apache-2.0
//! What lies between a client and the API server, and may stop carrying.

use std::net::SocketAddr;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// For connections made since the last of so many stalls.
    Open {
        stalls: u32,
    },
    Closed,
}

pub struct Relay {
    pub address: SocketAddr,
    way: watch::Sender<Way>,
}

impl Relay {
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (way, seen) = watch::channel(Way::Open { stalls: 0 });
        tokio::spawn(accept(listener, to, seen));
        Self { address, way }
    }

    /// Connections that are there carry nothing from now on, and neither end is told; new ones are carried.
    pub fn stall(&self) {
        self.way.send_modify(|way| {
            if let Way::Open { stalls } = way {
                *stalls += 1;
            }
        });
    }

    /// Ends every connection, and each that is made.
    pub fn close(&self) {
        self.way.send_replace(Way::Closed);
    }

    pub fn open(&self) {
        self.way.send_replace(Way::Open { stalls: 0 });
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, mut way: watch::Receiver<Way>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = gone(&mut way) => return,
        };
        let mut way = way.clone();
        let at_first = *way.borrow_and_update();
        if at_first == Way::Closed {
            continue;
        }
        tokio::spawn(async move {
            let mut here = accepted.0;
            let Ok(mut there) = TcpStream::connect(to).await else {
                return;
            };
            tokio::select! {
                _ = copy_bidirectional(&mut here, &mut there) => return,
                _ = way.wait_for(|way| *way != at_first) => {}
            }
            let _ = way.wait_for(|way| *way == Way::Closed).await;
        });
    }
}

async fn gone(way: &mut watch::Receiver<Way>) {
    while way.changed().await.is_ok() {}
}
