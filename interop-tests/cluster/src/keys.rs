// SPDX-License-Identifier: Apache-2.0
use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A certificate authority for one cluster's own programs, and what it issued, as files.
#[derive(Debug)]
pub(crate) struct Keys {
    folder: PathBuf,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Keys {
    /// Makes the authority (`ca.crt`) and the key pair that signs ServiceAccount tokens (`sa.key`, `sa.pub`).
    pub(crate) fn new(folder: &Path) -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
        ];
        params
            .distinguished_name
            .push(DnType::CommonName, "cluster under test");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        fs::write(folder.join("ca.crt"), authority.pem())?;
        let accounts = KeyPair::generate()?;
        fs::write(folder.join("sa.key"), accounts.serialize_pem())?;
        fs::write(folder.join("sa.pub"), accounts.public_key_pem())?;
        Ok(Self {
            folder: folder.to_owned(),
            authority,
        })
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `<name>.crt` and `<name>.key`, for a server with these DNS names and addresses.
    pub(crate) fn server(&self, name: &str, subjects: &[String]) -> anyhow::Result<()> {
        let mut params = CertificateParams::new(subjects)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, params)
    }

    /// `<name>.crt` and `<name>.key`, for a client that Kubernetes knows as this user of this group.
    pub(crate) fn client(&self, name: &str, user: &str, group: &str) -> anyhow::Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(name, params)
    }

    fn issue(&self, name: &str, mut params: CertificateParams) -> anyhow::Result<()> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params
            .signed_by(&key, &self.authority)
            .with_context(|| format!("issuing {name}"))?;
        fs::write(self.file(&format!("{name}.crt")), certificate.pem())?;
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }
}
