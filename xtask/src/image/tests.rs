// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Read;

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("podveil-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _best_effort = fs::remove_dir_all(&self.0);
    }
}

/// Programs of the right names that are not ours: what an image holds beside them does not depend on them.
fn built(folder: &Folder) -> Built {
    let programs = |name: &Name| [name.programs(), name.host_programs()].concat();
    for program in Name::ALL.iter().flat_map(programs) {
        fs::copy("/bin/true", folder.0.join(program)).unwrap();
    }
    Built {
        programs: folder.0.clone(),
        host_programs: folder.0.clone(),
    }
}

/// Unpacks an archive as a runtime does: through the index, the manifest and the layers in their order.
fn unpack(archive: &[u8], target: &Path) {
    let mut blobs = std::collections::BTreeMap::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        blobs.insert(name, bytes);
    }
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    let blob = |descriptor: &serde_json::Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        &blobs[&digest.replace("sha256:", "blobs/sha256/")]
    };
    let index = json(&blobs["index.json"]);
    let manifest = json(blob(&index["manifests"][0]));
    for layer in manifest["layers"].as_array().unwrap() {
        let bytes = flate2::read::GzDecoder::new(blob(layer).as_slice());
        tar::Archive::new(bytes).unpack(target).unwrap();
    }
}

#[test]
fn an_image_holds_its_programs_and_nothing_that_lets_a_shell_run() {
    let folder = Folder::new("image-contents");
    for name in Name::ALL {
        let image = image(name, &built(&folder)).unwrap();
        let holds = |path: &str| image.layers.iter().any(|layer| layer.contains(path));
        for program in name.programs() {
            assert!(holds(&format!("/usr/bin/{program}")), "{name:?}: {program}");
        }
        assert_eq!(holds("/usr/sbin/nft"), name == Name::Node, "{name:?}");
        assert_eq!(image.user == 0, name == Name::Node, "{name:?}");
        assert!(!holds("/bin/sh") && !holds("/usr/bin/sh"), "{name:?}");
    }
}

#[test]
#[ignore = "netns"]
fn programs_and_tools_run_in_an_image_that_holds_nothing_else() {
    let folder = Folder::new("image-programs");
    let root = Folder::new("image-root");
    let archive = image(Name::Node, &built(&folder))
        .unwrap()
        .archive()
        .unwrap();
    unpack(&archive, &root.0);
    for (program, arguments) in [
        ("/usr/sbin/nft", vec!["--version"]),
        ("/usr/sbin/ipset", vec!["--version"]),
        (
            "/usr/sbin/xtables-nft-multi",
            vec!["iptables", "-m", "cgroup", "-j", "REDIRECT", "--help"],
        ),
        ("/usr/bin/podveil-node", vec![]),
    ] {
        let output = Command::new("chroot")
            .arg(&root.0)
            .arg(program)
            .args(arguments)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {message}");
    }
}
