// SPDX-License-Identifier: Apache-2.0
//! A CA's authorities, and certificates of theirs.

use podveil_ca_client::{Credentials, Key, ProgramCredentials, Svid, TrustBundle};
use podveil_ca_issuer::{Authority, Csr};
use podveil_identity::{SpiffeId, TrustDomain};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const HOUR: Duration = Duration::from_secs(3600);

pub struct Authorities {
    pub trust_domain: TrustDomain,
    root: Authority,
    issuing: Authority,
}

impl Authorities {
    pub fn new() -> Self {
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        let now = SystemTime::now();
        let root = Authority::new_root(&trust_domain, now, HOUR).unwrap();
        let issuing = root.new_issuing(now, HOUR).unwrap();
        Self {
            trust_domain,
            root,
            issuing,
        }
    }

    pub fn credentials(&self, id: &SpiffeId) -> ProgramCredentials {
        let key = Key::generate().unwrap();
        let request = Csr::from_pem(&key.request(id).unwrap()).unwrap();
        let leaf = self
            .issuing
            .issue(&request.key, id, HOUR, SystemTime::now())
            .unwrap();
        let chain = vec![leaf.certificate, self.issuing.certificate().clone()];
        let roots = vec![self.root.certificate().clone()];
        ProgramCredentials::fixed(Credentials {
            svid: Arc::new(Svid::new(chain, &key, 1).unwrap()),
            bundle: Arc::new(TrustBundle::new(self.trust_domain.clone(), 1, roots, 1).unwrap()),
        })
    }
}
