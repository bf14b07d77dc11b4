// SPDX-License-Identifier: Apache-2.0
use crate::ca::{CA, HOUR, LeafSpec, NODE, TestCa, WEB, bundle, leaf, trust_domain};
use podveil_ca_client::TrustBundle;
use podveil_ca_client::verify::{Expected, PeerError, Verifier, peer_id};
use podveil_identity::SpiffeId;
use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::Arc;
use std::time::SystemTime;
use webpki::KeyUsage;

fn verify(
    bundle: &Arc<TrustBundle>,
    expected: Expected,
    chain: &[CertificateDer<'_>],
) -> Result<SpiffeId, PeerError> {
    Verifier::new(bundle.clone(), expected).verify_chain(
        chain,
        KeyUsage::client_auth(),
        UnixTime::now(),
    )
}

/// Verifies one leaf of a CA that is trusted.
fn check(spec: &LeafSpec) -> Result<SpiffeId, PeerError> {
    let ca = TestCa::new("a");
    verify(&bundle(1, &[&ca], 0), Expected::Any, &ca.chain(spec))
}

#[test]
fn a_leaf_that_keeps_the_rules_is_taken() {
    assert_eq!(check(&leaf(WEB)).unwrap().to_string(), WEB);
}

#[test]
fn two_uri_sans_are_refused() {
    let spec = LeafSpec {
        uris: vec![WEB, NODE],
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::UriSans { found: 2 })));
}

#[test]
fn no_uri_san_is_refused() {
    let spec = LeafSpec {
        uris: vec![],
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::UriSans { found: 0 })));
}

#[test]
fn a_leaf_that_may_only_sign_certificates_is_refused() {
    let spec = LeafSpec {
        key_usages: vec![KeyUsagePurpose::KeyCertSign],
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::MaySign)));
}

#[test]
fn a_leaf_that_may_also_sign_revocation_lists_is_refused() {
    let spec = LeafSpec {
        key_usages: vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::MaySign)));
}

#[test]
fn a_leaf_without_digital_signature_is_refused() {
    for key_usages in [vec![], vec![KeyUsagePurpose::KeyEncipherment]] {
        let spec = LeafSpec {
            key_usages,
            ..leaf(WEB)
        };
        assert!(matches!(check(&spec), Err(PeerError::NoDigitalSignature)));
    }
}

#[test]
fn a_ca_as_leaf_is_refused() {
    let spec = LeafSpec {
        is_ca: IsCa::Ca(BasicConstraints::Unconstrained),
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::Path(_))));
    let chain = TestCa::new("a").chain(&spec);
    assert!(matches!(peer_id(&chain), Err(PeerError::IsCa)));
}

#[test]
fn a_leaf_for_servers_only_is_refused_as_client() {
    let spec = LeafSpec {
        extended: vec![ExtendedKeyUsagePurpose::ServerAuth],
        ..leaf(WEB)
    };
    assert!(matches!(check(&spec), Err(PeerError::Path(_))));
}

#[test]
fn another_scheme_or_an_id_without_path_is_refused() {
    for uri in [
        "https://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/../sa/web",
        "spiffe://cluster.local/ns/sh%6fp/sa/web",
    ] {
        assert!(
            matches!(check(&leaf(uri)), Err(PeerError::NotSpiffe(_))),
            "{uri}"
        );
    }
    assert!(matches!(
        check(&leaf("spiffe://cluster.local")),
        Err(PeerError::RootPath { .. })
    ));
}

#[test]
fn another_trust_domain_of_the_same_root_is_refused() {
    let spec = leaf("spiffe://other.local/ns/shop/sa/web");
    assert!(matches!(check(&spec), Err(PeerError::TrustDomain { .. })));
}

#[test]
fn an_expired_or_future_leaf_is_refused() {
    let now = SystemTime::now();
    let expired = LeafSpec {
        not_before: now - 2 * HOUR,
        not_after: now - HOUR,
        ..leaf(WEB)
    };
    assert!(matches!(
        check(&expired),
        Err(PeerError::Path(webpki::Error::CertExpired { .. }))
    ));
    let future = LeafSpec {
        not_before: now + HOUR,
        not_after: now + 2 * HOUR,
        ..leaf(WEB)
    };
    assert!(matches!(
        check(&future),
        Err(PeerError::Path(webpki::Error::CertNotValidYet { .. }))
    ));
}

#[test]
fn only_who_is_expected_is_taken() {
    let ca = TestCa::new("a");
    let bundle = bundle(1, &[&ca], 0);
    let id = |uri| SpiffeId::new(uri).unwrap();
    let cases = [
        (WEB, Expected::AnyWorkload, true),
        (WEB, Expected::AnyProgram, false),
        (WEB, Expected::Exactly(vec![id(NODE), id(WEB)]), true),
        (WEB, Expected::Exactly(vec![id(NODE)]), false),
        (WEB, Expected::Exactly(vec![]), false),
        (NODE, Expected::AnyProgram, true),
        (NODE, Expected::AnyWorkload, false),
        (CA, Expected::Exactly(vec![id(CA)]), true),
        (
            "spiffe://cluster.local/ns/shop/sa/web/x",
            Expected::AnyWorkload,
            false,
        ),
    ];
    for (uri, expected, taken) in cases {
        let case = format!("{uri} {expected:?}");
        match verify(&bundle, expected, &ca.chain(&leaf(uri))) {
            Ok(_) => assert!(taken, "{case} was taken"),
            Err(PeerError::Unexpected { .. }) => assert!(!taken, "{case} was refused"),
            Err(other) => panic!("{case}: {other:?}"),
        }
    }
}

#[test]
fn during_a_root_rotation_both_roots_are_taken_and_the_withdrawn_one_is_refused_after_it() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let of_old = old.chain(&leaf(WEB));
    let of_new = new.chain(&leaf(WEB));
    let trusts = |bundle: &Arc<TrustBundle>| {
        [&of_old, &of_new].map(|chain| verify(bundle, Expected::Any, chain).is_ok())
    };
    assert_eq!(trusts(&bundle(1, &[&old], 0)), [true, false]);
    assert_eq!(trusts(&bundle(2, &[&old, &new], 0)), [true, true]);
    assert_eq!(trusts(&bundle(3, &[&new], 1)), [false, true]);
    assert_eq!(trusts(&bundle(4, &[], 1)), [false, false]);
    assert_eq!(
        trusts(&Arc::new(TrustBundle::empty(trust_domain()))),
        [false, false]
    );
}

#[test]
fn bytes_that_are_no_certificate_are_refused() {
    let chain = TestCa::new("a").chain(&leaf(WEB));
    let whole = chain[0].as_ref();
    assert!(matches!(peer_id(&[]), Err(PeerError::NoCertificate)));
    for length in 0..whole.len() {
        let cut = CertificateDer::from(whole[..length].to_vec());
        assert!(peer_id(&[cut]).is_err(), "{length} bytes were taken");
    }
    let longer = CertificateDer::from([whole, b"x"].concat());
    assert!(matches!(peer_id(&[longer]), Err(PeerError::Malformed)));
}

#[test]
fn a_chain_that_is_too_long_is_refused() {
    let ca = TestCa::new("a");
    let mut chain = ca.chain(&leaf(WEB));
    chain.resize(9, chain[1].clone());
    assert!(matches!(
        verify(&bundle(1, &[&ca], 0), Expected::Any, &chain),
        Err(PeerError::ChainTooLong { found: 9 })
    ));
}
