// SPDX-License-Identifier: Apache-2.0
//! An OCI image as one tar: an OCI image layout (image-spec 1.1), with the `manifest.json` that `docker load` reads.
//!
//! The same files give the same bytes: entries are sorted, times and owners are fixed, nothing of this machine gets in.

use anyhow::{Context, ensure};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// One file of a layer.
#[derive(Clone, Debug)]
pub struct File {
    pub mode: u32,
    pub bytes: Vec<u8>,
}

/// Files by their absolute path; the folders above them follow from it. Everything belongs to root.
#[derive(Clone, Debug, Default)]
pub struct Layer(BTreeMap<String, File>);

/// What a runtime has to know beside the files.
#[derive(Clone, Debug)]
pub struct Image {
    /// Name without registry, `podveil/node`.
    pub name: String,
    pub tag: String,
    pub entrypoint: String,
    /// Numeric, so that a kubelet can check `runAsNonRoot`.
    pub user: u32,
    pub layers: Vec<Layer>,
}

impl Layer {
    /// Adds a file; the one that stood there is replaced.
    /// # Errors
    /// A path that is not absolute, or leaves the root.
    pub fn add(&mut self, path: &str, mode: u32, bytes: Vec<u8>) -> anyhow::Result<()> {
        let legal = path.starts_with('/')
            && path[1..]
                .split('/')
                .all(|part| !matches!(part, "" | "." | ".."));
        ensure!(legal, "{path:?} is not an absolute path of a file");
        self.0.insert(path.to_owned(), File { mode, bytes });
        Ok(())
    }

    pub fn contains(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }

    /// Bytes of all files, before compression.
    pub fn size_bytes(&self) -> usize {
        self.0.values().map(|file| file.bytes.len()).sum()
    }

    fn tar(&self) -> anyhow::Result<Vec<u8>> {
        let folders: BTreeSet<&str> = self
            .0
            .keys()
            .flat_map(|path| {
                path.match_indices('/')
                    .map(|(end, _)| &path[1..end.max(1)])
                    .filter(|folder| !folder.is_empty())
            })
            .collect();
        let mut tar = tar::Builder::new(Vec::new());
        for folder in folders {
            append(&mut tar, &format!("{folder}/"), 0o755, None)?;
        }
        for (path, file) in &self.0 {
            append(&mut tar, &path[1..], file.mode, Some(&file.bytes))?;
        }
        tar.into_inner().context("finishing a layer")
    }
}

impl Image {
    /// The name as containerd knows it; a kubelet asks for `podveil/node:1` under this.
    pub fn reference(&self) -> String {
        format!("docker.io/{}:{}", self.name, self.tag)
    }

    /// The whole archive.
    /// # Errors
    /// None that outside input can cause: a path too long for tar.
    pub fn archive(&self) -> anyhow::Result<Vec<u8>> {
        let mut blobs = BTreeMap::new();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let tar = layer.tar()?;
            diff_ids.push(format!("sha256:{}", hex(&tar)));
            layers.push(blob(&mut blobs, LAYER, gzip(&tar)?));
        }
        let config = json!({
            "created": "1970-01-01T00:00:00Z",
            "architecture": architecture()?,
            "os": "linux",
            "config": {
                "User": format!("{0}:{0}", self.user),
                "Env": ["PATH=/usr/sbin:/usr/bin"],
                "Entrypoint": [self.entrypoint],
                "Labels": {
                    "org.opencontainers.image.title": self.name,
                    "org.opencontainers.image.version": self.tag,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = blob(&mut blobs, CONFIG, config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        let mut manifest = blob(&mut blobs, MANIFEST, manifest.to_string().into_bytes());
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.reference(),
            "org.opencontainers.image.ref.name": self.tag,
        });
        let path = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("made by `blob`");
            digest.replacen("sha256:", "blobs/sha256/", 1)
        };
        let docker = json!([{
            "Config": path(&config),
            "RepoTags": [format!("{}:{}", self.name, self.tag)],
            "Layers": layers.iter().map(path).collect::<Vec<_>>(),
        }]);
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });

        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in [
            ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
            ("index.json", index),
            ("manifest.json", docker),
        ] {
            append(&mut tar, name, 0o644, Some(bytes.to_string().as_bytes()))?;
        }
        for folder in ["blobs/", "blobs/sha256/"] {
            append(&mut tar, folder, 0o755, None)?;
        }
        for (digest, bytes) in blobs {
            let name = format!("blobs/sha256/{digest}");
            append(&mut tar, &name, 0o644, Some(&bytes))?;
        }
        tar.into_inner().context("finishing the archive")
    }
}

/// Keeps the bytes under their digest and returns their descriptor.
fn blob(blobs: &mut BTreeMap<String, Vec<u8>>, media_type: &str, bytes: Vec<u8>) -> Value {
    let digest = hex(&bytes);
    let descriptor = json!({
        "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len(),
    });
    blobs.insert(digest, bytes);
    descriptor
}

/// A file, or a folder if there are no bytes.
fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    path: &str,
    mode: u32,
    bytes: Option<&[u8]>,
) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(match bytes {
        Some(_) => tar::EntryType::Regular,
        None => tar::EntryType::Directory,
    });
    let bytes = bytes.unwrap_or_default();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    for zero in [
        tar::Header::set_uid,
        tar::Header::set_gid,
        tar::Header::set_mtime,
    ] {
        zero(&mut header, 0);
    }
    tar.append_data(&mut header, path, bytes)
        .with_context(|| format!("{path} in a tar"))
}

fn gzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    // Its header has neither name nor time unless they are set.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).context("compressing a layer")?;
    encoder.finish().context("compressing a layer")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The name of this machine's architecture in image-spec, which takes Go's.
fn architecture() -> anyhow::Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => anyhow::bail!("images for {other} are not made: nothing here was tried on it"),
    }
}

#[cfg(test)]
mod tests;
