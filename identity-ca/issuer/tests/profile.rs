// SPDX-License-Identifier: Apache-2.0
//! What is issued, as other libraries read it: x509-parser for the fields, webpki for the path.

use podveil_ca_issuer::{
    Authority, AuthorityError, Csr, IssueError, Leaf, Role, SubjectKey, chain,
};
use podveil_identity::{SpiffeId, TrustDomain};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::{Duration, SystemTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::*;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Fixture {
    root: Authority,
    issuing: Authority,
    key: SubjectKey,
    id: SpiffeId,
    now: SystemTime,
}

fn fixture() -> Fixture {
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_789);
    let root =
        Authority::new_root(&TrustDomain::new("cluster.local").unwrap(), now, 365 * DAY).unwrap();
    let issuing = root.new_issuing(now, 30 * DAY).unwrap();
    Fixture {
        root,
        issuing,
        key: SubjectKey::of(&KeyPair::generate().unwrap()),
        id: SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
        now,
    }
}

impl Fixture {
    fn issue(&self, life: Duration) -> Leaf {
        self.issuing
            .issue(&self.key, &self.id, life, self.now)
            .unwrap()
    }
}

fn verify(
    leaf: &Leaf,
    issuing: &Authority,
    root: &Authority,
    at: SystemTime,
) -> Result<(), webpki::Error> {
    let anchors = [anchor_from_trusted_cert(root.certificate()).unwrap()];
    let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        EndEntityCert::try_from(&leaf.certificate)?.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            std::slice::from_ref(issuing.certificate()),
            at,
            usage,
            None,
            None,
        )?;
    }
    Ok(())
}

#[test]
fn a_leaf_has_exactly_the_profile() {
    let fixture = fixture();
    let leaf = fixture.issue(DAY);
    let (rest, certificate) = X509Certificate::from_der(&leaf.certificate).unwrap();
    assert!(rest.is_empty());
    assert_eq!(certificate.version(), X509Version::V3);
    assert_eq!(certificate.subject().iter().count(), 0);
    assert_eq!(certificate.raw_serial(), leaf.serial.as_bytes());
    assert_eq!(certificate.raw_serial().len(), 16);

    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(
        names.value.general_names,
        [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]
    );
    let usage = certificate.key_usage().unwrap().unwrap();
    assert!(usage.critical);
    assert_eq!(usage.value.to_string(), "Digital Signature");
    let purposes = certificate.extended_key_usage().unwrap().unwrap();
    assert!(!purposes.critical && !purposes.value.any);
    assert!(purposes.value.server_auth && purposes.value.client_auth);
    let basic = certificate.basic_constraints().unwrap().unwrap();
    assert!(basic.critical && !basic.value.ca);
    assert_eq!(
        certificate.extensions().len(),
        6,
        "AKI, SAN, KU, EKU, SKI, BasicConstraints and nothing else"
    );
}

#[test]
fn every_key_kind_passes_webpki() {
    let fixture = fixture();
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ] {
        let pair = KeyPair::generate_for(algorithm).unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap()
            .pem()
            .unwrap();
        let key = Csr::from_pem(&csr).unwrap().key;
        let leaf = fixture
            .issuing
            .issue(&key, &fixture.id, DAY, fixture.now)
            .unwrap();
        verify(&leaf, &fixture.issuing, &fixture.root, fixture.now + HOUR).unwrap();
        assert!(matches!(
            verify(
                &leaf,
                &fixture.issuing,
                &fixture.root,
                fixture.now + 2 * DAY
            ),
            Err(webpki::Error::CertExpired { .. })
        ));
    }
}

#[test]
fn two_certificates_of_one_key_differ_in_serial() {
    let fixture = fixture();
    assert_ne!(fixture.issue(DAY).serial, fixture.issue(DAY).serial);
}

#[test]
fn back_dating_is_two_minutes_or_a_tenth_of_the_life() {
    let fixture = fixture();
    for (life, back) in [(24 * 3600, 120), (1200, 120), (600, 60), (60, 6), (9, 0)] {
        let leaf = fixture.issue(Duration::from_secs(life));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(leaf.not_before, now - Duration::from_secs(back), "{life} s");
        assert_eq!(leaf.not_after, now + Duration::from_secs(life), "{life} s");
        assert!(!leaf.clamped);
    }
}

#[test]
fn a_leaf_ends_with_its_issuer_at_the_latest() {
    let fixture = fixture();
    let late = fixture.issuing.not_after() - Duration::from_secs(100);
    let leaf = fixture
        .issuing
        .issue(&fixture.key, &fixture.id, DAY, late)
        .unwrap();
    assert!(leaf.clamped);
    assert_eq!(leaf.not_after, fixture.issuing.not_after());
    assert_eq!(leaf.not_before, late - Duration::from_secs(10));
    assert!(matches!(
        fixture
            .issuing
            .issue(&fixture.key, &fixture.id, DAY, fixture.issuing.not_after()),
        Err(IssueError::IssuerEnded)
    ));
}

#[test]
fn another_trust_domain_or_no_path_is_refused() {
    let fixture = fixture();
    for id in ["spiffe://other.domain/ns/a/sa/b", "spiffe://cluster.local"] {
        let id = SpiffeId::new(id).unwrap();
        assert!(matches!(
            fixture.issuing.issue(&fixture.key, &id, DAY, fixture.now),
            Err(IssueError::WrongTrustDomain { .. })
        ));
    }
}

#[test]
fn roots_sign_no_leaf_and_issuers_no_issuer() {
    let fixture = fixture();
    assert!(matches!(
        fixture
            .root
            .issue(&fixture.key, &fixture.id, DAY, fixture.now),
        Err(IssueError::NotIssuing { .. })
    ));
    assert!(matches!(
        fixture.issuing.new_issuing(fixture.now, DAY),
        Err(AuthorityError::NotARoot { .. })
    ));
}

#[test]
fn authorities_have_names_of_their_own_and_survive_being_kept() {
    let fixture = fixture();
    let second = Authority::new_root(fixture.root.trust_domain(), fixture.now, DAY).unwrap();
    assert_ne!(second.subject(), fixture.root.subject());
    for (authority, role) in [
        (&fixture.root, Role::Root),
        (&fixture.issuing, Role::Issuing),
    ] {
        let again = Authority::from_pem(authority.certificate_pem(), &authority.key_pem()).unwrap();
        assert_eq!(again.role(), role);
        assert_eq!(again.serial(), authority.serial());
        assert_eq!(again.certificate(), authority.certificate());
        assert_eq!(again.not_after(), authority.not_after());
    }
    let again = Authority::from_pem(
        fixture.issuing.certificate_pem(),
        &fixture.issuing.key_pem(),
    )
    .unwrap();
    let leaf = again
        .issue(&fixture.key, &fixture.id, DAY, fixture.now)
        .unwrap();
    verify(&leaf, &again, &fixture.root, fixture.now).unwrap();
    assert!(verify(&leaf, &again, &second, fixture.now).is_err());
}

#[test]
fn an_authority_kept_with_another_key_is_refused() {
    let fixture = fixture();
    assert!(matches!(
        Authority::from_pem(fixture.root.certificate_pem(), &fixture.issuing.key_pem()),
        Err(AuthorityError::KeyMismatch)
    ));
    let leaf = fixture.issue(DAY);
    assert!(matches!(
        Authority::from_pem(&leaf.pem, &fixture.root.key_pem()),
        Err(AuthorityError::Malformed { .. })
    ));
}

#[test]
fn an_issuing_authority_ends_with_its_root_at_the_latest() {
    let fixture = fixture();
    let issuing = fixture.root.new_issuing(fixture.now, 3650 * DAY).unwrap();
    assert_eq!(issuing.not_after(), fixture.root.not_after());
}

#[test]
fn debug_output_has_no_key() {
    let fixture = fixture();
    assert!(!format!("{:?}", fixture.root).contains("PRIVATE"));
}

#[test]
fn the_chain_is_leaf_intermediate_roots() {
    let fixture = fixture();
    let second = Authority::new_root(fixture.root.trust_domain(), fixture.now, DAY).unwrap();
    let leaf = fixture.issue(DAY);
    let chain = chain(&leaf, &fixture.issuing, [&fixture.root, &second]);
    let blocks: Vec<Vec<CertificateDer<'_>>> = chain
        .iter()
        .map(|element| {
            assert!(element.ends_with("-----END CERTIFICATE-----\n") && !element.contains('\r'));
            CertificateDer::pem_slice_iter(element.as_bytes())
                .collect::<Result<_, _>>()
                .unwrap()
        })
        .collect();
    assert_eq!(
        blocks,
        [
            vec![leaf.certificate.clone()],
            vec![fixture.issuing.certificate().clone()],
            vec![
                fixture.root.certificate().clone(),
                second.certificate().clone()
            ],
        ]
    );
}

#[test]
fn a_life_past_the_year_9999_is_refused_and_does_not_panic() {
    let now = SystemTime::now();
    let domain = TrustDomain::new("cluster.local").unwrap();
    for life in [8000 * 365 * DAY, Duration::MAX] {
        assert!(matches!(
            Authority::new_root(&domain, now, life),
            Err(AuthorityError::TooLong { .. })
        ));
        let root = Authority::new_root(&domain, now, 365 * DAY).unwrap();
        assert!(matches!(
            root.new_issuing(now, life),
            Err(AuthorityError::TooLong { .. })
        ));
    }
    let leaf = fixture().issue(Duration::MAX);
    assert!(leaf.clamped);
}
