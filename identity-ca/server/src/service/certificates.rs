// SPDX-License-Identifier: Apache-2.0
use super::peer;
use crate::issuance::Issuance;
use podveil_proto::istio::v1::auth::istio_certificate_service_server::IstioCertificateService;
use podveil_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use podveil_proto::podveil::ca::v1::programs_server::Programs;
use podveil_proto::podveil::ca::v1::{ProgramSvidRequest, ProgramSvidResponse};
use prost_types::value::Kind;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Request, Response, Status};

/// Response metadata of `CreateCertificate`: the generation of the certificate, in decimal.
pub const GENERATION_KEY: &str = "podveil-certificate-generation";
const IDENTITY_KEY: &str = "ImpersonatedIdentity";

#[derive(Clone, Debug)]
pub(crate) struct CertificatesService(pub(crate) Arc<Issuance>);

#[tonic::async_trait]
impl IstioCertificateService for CertificatesService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = peer(&request);
        let request = request.into_inner();
        let identity = request
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.fields.get(IDENTITY_KEY))
            .and_then(|value| match &value.kind {
                Some(Kind::StringValue(text)) => Some(text.as_str()),
                _ => None,
            });
        // Zero or less asks for the default, as with istiod.
        let life = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
        let issued = self
            .0
            .workload(peer.as_ref(), identity, &request.csr, life)
            .await?;
        let mut response = Response::new(IstioCertificateResponse {
            cert_chain: issued.chain,
        });
        response
            .metadata_mut()
            .insert(GENERATION_KEY, MetadataValue::from(issued.generation));
        Ok(response)
    }
}

#[tonic::async_trait]
impl Programs for CertificatesService {
    async fn issue_program_svid(
        &self,
        request: Request<ProgramSvidRequest>,
    ) -> Result<Response<ProgramSvidResponse>, Status> {
        let peer = peer(&request);
        let token = bearer(request.metadata());
        let issued = self
            .0
            .program(peer.as_ref(), token, &request.get_ref().csr)
            .await?;
        Ok(Response::new(ProgramSvidResponse {
            cert_chain: issued.chain,
            certificate_generation: issued.generation,
        }))
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let (scheme, token) = metadata
        .get("authorization")?
        .to_str()
        .ok()?
        .split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_read_and_nothing_else() {
        for (header, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer abc", Some("abc")),
            ("Basic abc", None),
            ("Bearer", None),
            ("", None),
        ] {
            let mut metadata = MetadataMap::new();
            metadata.insert("authorization", header.parse().unwrap());
            assert_eq!(bearer(&metadata), token, "{header:?}");
        }
        assert_eq!(bearer(&MetadataMap::new()), None);
    }
}
