// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask image`: the container images, made of the built programs and of the few files of this machine that they
//! need, without a daemon and without a registry.
//!
//! The programs stay linked against glibc: the node image needs it for `nft` and `ip` anyway, and name look-up in a
//! static glibc needs the shared one at run time.

mod archive;
mod closure;

use crate::{build_programs, target, workspace};
use anyhow::{Context, ensure};
use archive::{Image, Layer};
use clap::ValueEnum;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The user of programs that need no privilege; the number that distroless images use too.
const NOBODY: u32 = 65532;

const PASSWD: &str = "root:x:0:0:root:/:/sbin/nologin\n\
                      podveil:x:65532:65532:podveil:/:/sbin/nologin\n";
const GROUP: &str = "root:x:0:\npodveil:x:65532:\n";
/// Both modules are inside glibc itself since 2.34.
const NSSWITCH: &str = "hosts: files dns\n";

#[derive(clap::Args)]
pub struct Arguments {
    /// How the programs are built.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// Only this image; may be given several times.
    #[arg(long, value_enum)]
    only: Vec<Name>,
    /// What the images are tagged with; the project's version if nothing is said.
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
}

impl Arguments {
    /// All images, of the programs that tests run too.
    pub fn dev() -> Self {
        Self {
            profile: Profile::Dev,
            only: Vec::new(),
            tag: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

#[derive(Clone, Copy, Eq, PartialEq, ValueEnum)]
enum Profile {
    Dev,
    Release,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Name {
    Ca,
    Controller,
    Node,
}

impl Name {
    const ALL: [Self; 3] = [Self::Ca, Self::Controller, Self::Node];

    fn word(self) -> &'static str {
        match self {
            Self::Ca => "ca",
            Self::Controller => "controller",
            Self::Node => "node",
        }
    }

    /// The first is the entry point.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Ca => &["podveil-ca"],
            // With the tool: `helm test` asks it, and nobody has to install it to ask.
            Self::Controller => &["podveil-controller", "podveilctl"],
            Self::Node => &["podveil-node"],
        }
    }

    /// Programs of this machine that ours run.
    fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Ca | Self::Controller => &[],
            Self::Node => &["ipset", "nft", "xtables-legacy-multi", "xtables-nft-multi"],
        }
    }

    /// Programs that run on the node itself, which may have another C library or none: linked statically.
    fn host_programs(self) -> &'static [&'static str] {
        match self {
            Self::Ca | Self::Controller => &[],
            Self::Node => &["podveil-cni"],
        }
    }

    fn user(self) -> u32 {
        match self {
            Self::Ca | Self::Controller => NOBODY,
            // Entering a pod's network namespace takes capabilities, and only root gets them at `exec`.
            Self::Node => 0,
        }
    }
}

/// Writes `target/images/<name>.tar` for each image.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let wanted = |name: &Name| arguments.only.is_empty() || arguments.only.contains(name);
    let names: Vec<Name> = Name::ALL.into_iter().filter(wanted).collect();
    let built = build(arguments.profile, &names)?;
    let folder = workspace().join("target/images");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for name in names {
        let image = Image {
            tag: arguments.tag.clone(),
            ..image(name, &built)?
        };
        let files: usize = image.layers.iter().map(Layer::size_bytes).sum();
        let bytes = image.archive()?;
        let path = folder.join(format!("{}.tar", name.word()));
        // In one step: whoever imports it meanwhile reads the old one or the new one.
        let unfinished = path.with_extension("tar.new");
        fs::write(&unfinished, &bytes)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("writing {}", path.display()))?;
        println!(
            "{}  {}  {:.1} MB, unpacked {:.1} MB",
            path.display(),
            image.reference(),
            bytes.len() as f64 / 1e6,
            files as f64 / 1e6
        );
    }
    Ok(())
}

/// The folders of what was built.
struct Built {
    programs: PathBuf,
    host_programs: PathBuf,
}

/// Builds the programs of these images.
fn build(profile: Profile, names: &[Name]) -> anyhow::Result<Built> {
    let host = names.iter().flat_map(|name| name.host_programs());
    let host: Vec<&str> = host.copied().collect();
    let (programs, folder) = match profile {
        Profile::Dev => {
            build_programs()?;
            (target()?.join("debug"), "debug")
        }
        Profile::Release => (build_release(names)?, "release"),
    };
    for program in host {
        build_static(program, profile)?;
    }
    Ok(Built {
        programs,
        host_programs: static_target()?.join(folder),
    })
}

fn build_release(names: &[Name]) -> anyhow::Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace()).args(["build", "--release"]);
    for program in names.iter().flat_map(|name| name.programs()) {
        // A program's package has its name.
        cargo.args(["--package", program, "--bin", program]);
    }
    let status = cargo.status().context("starting cargo")?;
    ensure!(status.success(), "the programs cannot be built ({status})");
    Ok(target()?.join("release"))
}

fn image(name: Name, built: &Built) -> anyhow::Result<Image> {
    // Two layers: an upgrade brings a new program and keeps the rest.
    let mut base = Layer::default();
    let mut own = Layer::default();
    for (path, text) in [
        ("/etc/passwd", PASSWD),
        ("/etc/group", GROUP),
        ("/etc/nsswitch.conf", NSSWITCH),
    ] {
        base.add(path, 0o644, text.as_bytes().to_vec())?;
    }
    for tool in name.tools() {
        let path = tool_path(tool)?;
        add_libraries(&mut base, &path)?;
        base.add(&format!("/usr/sbin/{tool}"), 0o755, read(&path)?)?;
    }
    if name == Name::Node {
        add_xtables(&mut base)?;
    }
    for program in name.programs() {
        let path = built.programs.join(program);
        add_libraries(&mut base, &path)?;
        own.add(&format!("/usr/bin/{program}"), 0o755, stripped(&path)?)?;
    }
    for program in name.host_programs() {
        let path = built.host_programs.join(program);
        own.add(&format!("/usr/bin/{program}"), 0o755, stripped(&path)?)?;
    }
    Ok(Image {
        name: format!("podveil/{}", name.word()),
        tag: env!("CARGO_PKG_VERSION").to_owned(),
        entrypoint: format!("/usr/bin/{}", name.programs()[0]),
        user: name.user(),
        layers: vec![base, own],
    })
}

/// In a folder of its own, since cargo keeps one kind of linking for each.
fn static_target() -> anyhow::Result<PathBuf> {
    Ok(target()?.join("static"))
}

/// Builds it with the machine's own C library inside: no name is looked up, so nothing of that is missed at run time, and
/// no other toolchain is needed.
fn build_static(program: &str, profile: Profile) -> anyhow::Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(workspace())
        .args(["rustc", "--quiet", "--package", program, "--bin", program])
        .arg("--target-dir")
        .arg(static_target()?);
    let folder = match profile {
        Profile::Dev => "debug",
        Profile::Release => {
            cargo.arg("--release");
            "release"
        }
    };
    cargo.args(["--", "--codegen", "target-feature=+crt-static"]);
    let status = cargo.status().context("starting cargo")?;
    ensure!(status.success(), "{program} cannot be built ({status})");
    let path = static_target()?.join(folder).join(program);
    ensure!(
        closure::libraries(&path)?.is_empty(),
        "{program} is not linked statically"
    );
    Ok(())
}

fn add_libraries(layer: &mut Layer, program: &Path) -> anyhow::Result<()> {
    for library in closure::libraries(program)? {
        if !layer.contains(&library) {
            // Under the name that the loader asks for, whatever it is a link to here.
            layer.add(&library, 0o755, read(Path::new(&library))?)?;
        }
    }
    Ok(())
}

/// What iptables loads by name: its matches and targets, which it looks for where it was built to.
fn add_xtables(layer: &mut Layer) -> anyhow::Result<()> {
    let folder = ["/usr/lib", "/usr/lib64"]
        .into_iter()
        .map(|lib| format!("{lib}/xtables"))
        .chain([format!(
            "/usr/lib/{}-linux-gnu/xtables",
            std::env::consts::ARCH
        )])
        .find(|folder| Path::new(folder).is_dir())
        .context("the extensions of iptables are not installed; `make setup` does it")?;
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))? {
        let path = entry?.path();
        layer.add(&path.to_string_lossy(), 0o755, read(&path)?)?;
    }
    Ok(())
}

/// Where a system tool is; `/usr/sbin` is not in everybody's `PATH`.
fn tool_path(tool: &str) -> anyhow::Result<PathBuf> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let mut candidates = folders.iter().map(|folder| Path::new(folder).join(tool));
    candidates
        .find(|path| path.exists())
        .with_context(|| format!("{tool} is not installed; `make setup` does it"))
}

/// The program without what only a debugger reads; names for a panic's backtrace stay.
fn stripped(program: &Path) -> anyhow::Result<Vec<u8>> {
    let target = program.with_extension(format!("stripped-{}", std::process::id()));
    let output = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .args([&target, program])
        .output()
        .context("strip (binutils) cannot be run")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "strip {}: {message}",
        program.display()
    );
    let bytes = read(&target);
    fs::remove_file(&target).with_context(|| format!("removing {}", target.display()))?;
    bytes
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests;
