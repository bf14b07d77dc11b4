// SPDX-License-Identifier: Apache-2.0
use crate::{Authority, Leaf, Serial};
use podveil_identity::{SpiffeId, TrustDomain};
use rcgen::PublicKeyData;
use std::time::{Duration, SystemTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

/// The rule that a certificate breaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{rule}")]
pub struct CheckError {
    rule: &'static str,
}

impl CheckError {
    pub(crate) fn what(self) -> &'static str {
        self.rule
    }
}

fn require(holds: bool, rule: &'static str) -> Result<(), CheckError> {
    if holds {
        Ok(())
    } else {
        Err(CheckError { rule })
    }
}

/// What an authority's certificate says about itself.
pub(crate) struct ParsedAuthority {
    pub(crate) self_issued: bool,
    pub(crate) spki: Vec<u8>,
    pub(crate) serial: Serial,
    pub(crate) subject: String,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

pub(crate) fn authority(der: &[u8]) -> Result<ParsedAuthority, CheckError> {
    let certificate = parse(der)?;
    require(certificate.is_ca(), "an authority has cA true")?;
    let usage = certificate.key_usage().ok().flatten();
    require(
        usage.is_some_and(|usage| usage.critical && usage.value.key_cert_sign()),
        "an authority has the critical key usage keyCertSign",
    )?;
    let trust_domain = match uris(&certificate)?.as_slice() {
        [uri] => SpiffeId::new(uri).ok().filter(|id| id.path().is_empty()),
        _ => None,
    }
    .and_then(|id| TrustDomain::new(id.trust_domain_name()).ok())
    .ok_or(CheckError {
        rule: "an authority names exactly its trust domain",
    })?;
    Ok(ParsedAuthority {
        self_issued: certificate.subject().as_raw() == certificate.issuer().as_raw(),
        spki: certificate.public_key().raw.to_vec(),
        serial: serial(&certificate)?,
        subject: certificate.subject().to_string(),
        trust_domain,
        not_before: system_time(certificate.validity().not_before)?,
        not_after: system_time(certificate.validity().not_after)?,
    })
}

/// The names chain and the signature is the issuer's.
pub(crate) fn signed_by(der: &[u8], issuer: &[u8]) -> Result<(), CheckError> {
    let (certificate, issuer) = (parse(der)?, parse(issuer)?);
    require(
        certificate.issuer().as_raw() == issuer.subject().as_raw(),
        "the issuer's name is its subject",
    )?;
    require(
        certificate
            .verify_signature(Some(issuer.public_key()))
            .is_ok(),
        "the signature is the issuer's",
    )
}

/// All of X509-SVID §4 and §5 and our own profile, read from the bytes that will be sent.
pub(crate) fn leaf(
    leaf: &Leaf,
    issuer: &Authority,
    id: &SpiffeId,
    key: &impl PublicKeyData,
) -> Result<(), CheckError> {
    let certificate = parse(&leaf.certificate)?;
    signed_by(&leaf.certificate, issuer.certificate())?;
    require(
        certificate.public_key().raw == key.subject_public_key_info(),
        "the public key is the request's",
    )?;
    require(
        certificate.subject().iter().next().is_none(),
        "a leaf has no subject",
    )?;
    require(!certificate.is_ca(), "a leaf has cA false")?;
    let names = certificate.subject_alternative_name().ok().flatten();
    require(
        names.is_some_and(|names| names.critical && names.value.general_names.len() == 1),
        "a leaf has one name, critical",
    )?;
    require(
        uris(&certificate)? == [id.to_string().as_str()],
        "a leaf's name is its SPIFFE ID",
    )?;
    // Nothing but digitalSignature; that one bit is 1 in x509-parser's numbering.
    let usage = certificate.key_usage().ok().flatten();
    require(
        usage.is_some_and(|usage| usage.critical && usage.value.flags == 1),
        "a leaf has the critical key usage digitalSignature alone",
    )?;
    let purposes = certificate.extended_key_usage().ok().flatten();
    require(
        purposes.is_some_and(|purposes| purposes.value.client_auth && purposes.value.server_auth),
        "a leaf is for servers and clients",
    )?;
    require(
        key_ids(&certificate).0.is_some()
            && key_ids(&certificate).1 == key_ids(&parse(issuer.certificate())?).0,
        "a leaf names its key and its issuer's key",
    )?;
    require(
        serial(&certificate)? == leaf.serial,
        "the serial is the one drawn",
    )?;
    require(
        system_time(certificate.validity().not_before)? == leaf.not_before
            && system_time(certificate.validity().not_after)? == leaf.not_after
            && leaf.not_before < leaf.not_after
            && leaf.not_after <= issuer.not_after(),
        "the validity is as told and ends with the issuer's at the latest",
    )
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, CheckError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(CheckError {
            rule: "it is one certificate in DER",
        }),
    }
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, CheckError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| CheckError {
            rule: "the alternative names parse",
        })?;
    Ok(names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect())
}

/// Subject and authority key identifier.
fn key_ids<'a>(certificate: &X509Certificate<'a>) -> (Option<&'a [u8]>, Option<&'a [u8]>) {
    let mut ids = (None, None);
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => ids.0 = Some(id.0),
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                ids.1 = id.key_identifier.as_ref().map(|id| id.0);
            }
            _ => {}
        }
    }
    ids
}

fn serial(certificate: &X509Certificate<'_>) -> Result<Serial, CheckError> {
    Serial::try_from(certificate.raw_serial()).map_err(|_| CheckError {
        rule: "the serial is 16 bytes and positive",
    })
}

fn system_time(time: ASN1Time) -> Result<SystemTime, CheckError> {
    u64::try_from(time.timestamp())
        .ok()
        .and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .ok_or(CheckError {
            rule: "the validity lies after 1970",
        })
}
