// SPDX-License-Identifier: Apache-2.0
//! Root and intermediate made at test time, and leaves that may break any rule.

use podveil_ca_client::{Key, Svid, TrustBundle};
use podveil_identity::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;

pub const HOUR: Duration = Duration::from_secs(3600);
pub const NODE: &str = "spiffe://cluster.local/podveil/node/n1";
pub const CA: &str = "spiffe://cluster.local/podveil/ca";
pub const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub struct TestCa {
    root: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf with every rule kept; tests change what they break.
pub struct LeafSpec {
    pub uris: Vec<&'static str>,
    pub key_usages: Vec<KeyUsagePurpose>,
    pub extended: Vec<ExtendedKeyUsagePurpose>,
    pub is_ca: IsCa,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

pub fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

pub fn leaf(uri: &'static str) -> LeafSpec {
    LeafSpec {
        uris: vec![uri],
        key_usages: vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ],
        extended: vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
        is_ca: IsCa::NoCa,
        not_before: SystemTime::now() - HOUR / 10,
        not_after: SystemTime::now() + HOUR,
    }
}

impl TestCa {
    pub fn new(name: &str) -> Self {
        let authority = |name: String, depth| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(depth));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            (params, p256())
        };
        let (root, root_key) = authority(format!("{name} root"), 1);
        let (intermediate, key) = authority(format!("{name} intermediate"), 0);
        let root_der = root.self_signed(&root_key).unwrap().der().clone();
        let root = Issuer::new(root, root_key);
        Self {
            root: root_der,
            intermediate: intermediate.signed_by(&key, &root).unwrap().der().clone(),
            issuer: Issuer::new(intermediate, key),
        }
    }

    pub fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    pub fn sign(&self, spec: &LeafSpec, key: &impl PublicKeyData) -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = spec
            .uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.key_usages.clone_from(&spec.key_usages);
        params.extended_key_usages.clone_from(&spec.extended);
        params.is_ca = spec.is_ca;
        params.not_before = OffsetDateTime::from(spec.not_before);
        params.not_after = OffsetDateTime::from(spec.not_after);
        params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1 | 1));
        let leaf = params.signed_by(key, &self.issuer).unwrap();
        vec![leaf.der().clone(), self.intermediate.clone()]
    }

    /// A chain for a key that nobody needs.
    pub fn chain(&self, spec: &LeafSpec) -> Vec<CertificateDer<'static>> {
        self.sign(spec, &p256())
    }

    pub fn svid(&self, uri: &'static str) -> Arc<Svid> {
        let key = p256();
        let chain = self.sign(&leaf(uri), &key);
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Arc::new(Svid::from_der(chain, &der, 1).unwrap())
    }

    /// As the CA answers: leaf, intermediate, all roots together.
    pub fn answer(&self, csr: &str, spec: &LeafSpec) -> Vec<String> {
        let request = CertificateSigningRequestParams::from_pem(csr).unwrap();
        let mut answer: Vec<_> = self
            .sign(spec, &request.public_key)
            .into_iter()
            .map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref())))
            .collect();
        answer.push(bundle(0, &[self], 0).to_pem());
        answer
    }
}

pub fn bundle(sequence: u64, authorities: &[&TestCa], generation: u64) -> Arc<TrustBundle> {
    let roots = authorities.iter().map(|ca| ca.root()).collect();
    Arc::new(TrustBundle::new(trust_domain(), sequence, roots, generation).unwrap())
}

pub fn p256() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

#[test]
fn a_key_is_in_no_debug_output() {
    let ca = TestCa::new("a");
    let key = p256();
    let chain = ca.sign(&leaf(WEB), &key);
    // RFC 5915 inside PKCS#8: the 32 bytes of the private value stand after its own tag and length.
    let der = key.serialize_der();
    let at = der
        .windows(2)
        .position(|window| window == [0x04, 0x20])
        .unwrap();
    let secret = &der[at + 2..at + 34];
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let svid = Svid::from_der(chain, &der, 1).unwrap();
    let printed = format!(
        "{svid:?} {:?} {:?}",
        svid.certified_key(),
        Key::generate().unwrap()
    );
    for form in [
        secret
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>(),
        format!("{secret:?}").trim_matches(['[', ']']).to_owned(),
    ] {
        assert!(!printed.contains(&form), "the key was printed: {printed}");
    }
    assert!(printed.contains(WEB));
}

#[test]
fn a_chain_of_another_key_is_refused() {
    let ca = TestCa::new("a");
    let key = Key::generate().unwrap();
    assert!(Svid::new(ca.chain(&leaf(WEB)), &key, 1).is_err());
}

#[test]
fn a_bundle_survives_its_file_and_the_wire() {
    let (a, b) = (TestCa::new("a"), TestCa::new("b"));
    let bundle = bundle(7, &[&a, &b], 3);
    assert_eq!(
        TrustBundle::from_wire(&trust_domain(), bundle.to_wire()).unwrap(),
        *bundle
    );
    let read = TrustBundle::from_pem(trust_domain(), bundle.to_pem().as_bytes()).unwrap();
    assert_eq!(read.roots, bundle.roots);
    assert_eq!(read.sequence, 0);
}

#[test]
fn an_unreadable_bundle_is_refused_as_a_whole() {
    let ca = TestCa::new("a");
    let mut wire = bundle(1, &[&ca], 1).to_wire();
    wire.roots.push(b"not a certificate".to_vec());
    assert!(TrustBundle::from_wire(&trust_domain(), wire.clone()).is_err());
    wire.roots = vec![ca.root().to_vec(); 17];
    assert!(TrustBundle::from_wire(&trust_domain(), wire.clone()).is_err());
    wire.roots.clear();
    wire.trust_domain = "other.local".to_owned();
    assert!(TrustBundle::from_wire(&trust_domain(), wire).is_err());
}
