// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Read;

fn sample() -> Image {
    let mut libraries = Layer::default();
    libraries
        .add("/lib/a/libb.so.1", 0o755, b"library".to_vec())
        .unwrap();
    let mut program = Layer::default();
    program
        .add("/usr/bin/program", 0o755, vec![7; 100_000])
        .unwrap();
    program
        .add("/etc/passwd", 0o644, b"root:x:0:0::/:\n".to_vec())
        .unwrap();
    Image {
        name: "podveil/sample".into(),
        tag: "1.2.3".into(),
        entrypoint: "/usr/bin/program".into(),
        user: 65532,
        layers: vec![libraries, program],
    }
}

/// Entries of a tar in their order: name, mode, bytes.
fn entries(tar: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    tar::Archive::new(tar)
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(
                (
                    header.mtime().unwrap(),
                    header.uid().unwrap(),
                    header.gid().unwrap()
                ),
                (0, 0, 0)
            );
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mode = header.mode().unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (name, mode, bytes)
        })
        .collect()
}

fn file(archive: &[u8], name: &str) -> Vec<u8> {
    let mut found = entries(archive);
    found.retain(|entry| entry.0 == name);
    assert_eq!(found.len(), 1, "{name}");
    found.remove(0).2
}

fn json_file(archive: &[u8], name: &str) -> Value {
    serde_json::from_slice(&file(archive, name)).unwrap()
}

/// The bytes that a descriptor names; size and digest are checked as a runtime does.
fn follow(archive: &[u8], descriptor: &Value) -> Vec<u8> {
    let digest = descriptor["digest"].as_str().unwrap();
    let digest = digest.strip_prefix("sha256:").unwrap();
    let bytes = file(archive, &format!("blobs/sha256/{digest}"));
    assert_eq!(hex(&bytes), digest);
    assert_eq!(descriptor["size"], bytes.len());
    bytes
}

#[test]
fn an_image_reads_back_as_it_was_written() {
    let archive = sample().archive().unwrap();
    let layout = json_file(&archive, "oci-layout");
    assert_eq!(layout["imageLayoutVersion"], "1.0.0");
    let index = json_file(&archive, "index.json");
    let descriptor = &index["manifests"][0];
    assert_eq!(
        descriptor["annotations"]["io.containerd.image.name"],
        "docker.io/podveil/sample:1.2.3"
    );
    let manifest: Value = serde_json::from_slice(&follow(&archive, descriptor)).unwrap();
    let config: Value = serde_json::from_slice(&follow(&archive, &manifest["config"])).unwrap();
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"], json!(["/usr/bin/program"]));

    let layers = manifest["layers"].as_array().unwrap();
    let tars: Vec<Vec<u8>> = layers
        .iter()
        .map(|layer| {
            let mut tar = Vec::new();
            let compressed = follow(&archive, layer);
            flate2::read::GzDecoder::new(compressed.as_slice())
                .read_to_end(&mut tar)
                .unwrap();
            tar
        })
        .collect();
    let ids: Vec<String> = tars
        .iter()
        .map(|tar| format!("sha256:{}", hex(tar)))
        .collect();
    assert_eq!(config["rootfs"]["diff_ids"], json!(ids));
    let names = |tar: &[u8]| -> Vec<(String, u32)> {
        entries(tar)
            .into_iter()
            .map(|entry| (entry.0, entry.1))
            .collect()
    };
    assert_eq!(
        names(&tars[0]),
        [
            ("lib/".to_owned(), 0o755),
            ("lib/a/".to_owned(), 0o755),
            ("lib/a/libb.so.1".to_owned(), 0o755)
        ]
    );
    assert_eq!(file(&tars[1], "usr/bin/program"), vec![7; 100_000]);
}

#[test]
fn what_docker_load_reads_names_the_same_blobs() {
    let archive = sample().archive().unwrap();
    let docker = json_file(&archive, "manifest.json");
    let index = json_file(&archive, "index.json");
    let manifest: Value =
        serde_json::from_slice(&follow(&archive, &index["manifests"][0])).unwrap();
    let name = |path: &Value| path.as_str().unwrap().replace("blobs/sha256/", "sha256:");
    assert_eq!(docker[0]["RepoTags"], json!(["podveil/sample:1.2.3"]));
    assert_eq!(name(&docker[0]["Config"]), manifest["config"]["digest"]);
    let layers = docker[0]["Layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for (path, descriptor) in layers.iter().zip(manifest["layers"].as_array().unwrap()) {
        assert_eq!(name(path), descriptor["digest"]);
    }
}

#[test]
fn the_same_files_give_the_same_bytes_in_whatever_order_they_came() {
    let mut other = sample();
    let files = other.layers[1].clone();
    other.layers[1] = Layer::default();
    for (path, file) in files.0.into_iter().rev() {
        other.layers[1].add(&path, file.mode, file.bytes).unwrap();
    }
    assert_eq!(sample().archive().unwrap(), other.archive().unwrap());
    other.layers[0].add("/one/more", 0o644, Vec::new()).unwrap();
    assert_ne!(sample().archive().unwrap(), other.archive().unwrap());
}

#[test]
fn a_path_that_leaves_the_root_is_refused() {
    for path in ["", "a", "/", "//a", "/a/../b", "/./a", "/a/"] {
        assert!(
            Layer::default().add(path, 0o644, Vec::new()).is_err(),
            "{path}"
        );
    }
}
