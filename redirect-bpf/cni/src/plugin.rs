// SPDX-License-Identifier: Apache-2.0
use crate::ask::ask;
use crate::config::{Config, MAX_BYTES, NEWEST, VERSIONS};
use crate::environment::{Attachment, EnvironmentError, Verb, bounded};
use crate::failure::{Failure, What};
use crate::namespaces::NotEnrolled;
use crate::wire::{About, Answer, CAPTURE_BOUND, Request, UNKNOWN_BOUND};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use serde_json::json;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// The plugin's type in a configuration, and its file in the runtime's folder.
pub const PLUGIN: &str = "podveil-cni";
/// The node program answers by [`CAPTURE_BOUND`]; it may be busy.
const START_BOUND: Duration = CAPTURE_BOUND.saturating_add(Duration::from_secs(5));
/// What is, it says at once.
const CHECK_BOUND: Duration = UNKNOWN_BOUND;
/// A sandbox that ends waits for nobody.
const END_BOUND: Duration = Duration::from_secs(1);

/// Looks a variable of the environment up.
pub type Variables<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Does what the runtime asks for and returns what to write to standard output.
/// # Errors
/// [`Failure`], which displays as the error object to be written there instead.
pub fn run(variable: &Variables<'_>, input: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes);
    let version = Config::version_of(&bytes);
    let failure = |what: What| Failure::new(&version, what);
    read.map_err(|error| failure(What::Input(error)))?;
    let name = "CNI_COMMAND";
    let verb = bounded(variable, name)
        .and_then(|verb| verb.ok_or(EnvironmentError::Missing { name })?.parse())
        .map_err(|error| failure(error.into()))?;
    let outcome = match verb {
        Verb::Add => start(variable, &bytes),
        Verb::Check => check(variable, &bytes),
        Verb::Del => Ok(end(variable, &bytes)),
        // Nothing is kept here that could be left over.
        Verb::Gc => Ok(String::new()),
        // Pods of the namespaces that are never asked about can always be added, and a node that were not ready for want
        // of Podveil would never get it.
        Verb::Status => Config::parse(&bytes)
            .map(|_| String::new())
            .map_err(What::from),
        Verb::Version => Ok(versions(&version)),
    };
    outcome.map_err(failure)
}

fn versions(version: &str) -> String {
    let version = if VERSIONS.contains(&version) {
        version
    } else {
        NEWEST
    };
    json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string()
}

/// ADD: the result before, once the pod may start.
fn start(variable: &Variables<'_>, bytes: &[u8]) -> Result<String, What> {
    let config = Config::parse(bytes)?;
    let previous = config.previous()?.to_string();
    let attachment = Attachment::read(variable)?;
    let Some(request) = request(&config, &attachment, About::Start) else {
        return Ok(previous);
    };
    let name = "CNI_NETNS";
    let path = (attachment.netns).ok_or(EnvironmentError::Missing { name })?;
    let netns = open_netns(path)?;
    decide(&config, &request, Some(netns.as_fd()), START_BOUND)?;
    Ok(previous)
}

/// CHECK: does what is written by ADD still stand?
fn check(variable: &Variables<'_>, bytes: &[u8]) -> Result<String, What> {
    let config = Config::parse(bytes)?;
    config.previous()?;
    let attachment = Attachment::read(variable)?;
    if let Some(request) = request(&config, &attachment, About::Now) {
        decide(&config, &request, None, CHECK_BOUND)?;
    }
    Ok(String::new())
}

/// DEL never fails: a node program that is not told finds out by itself, a little later.
fn end(variable: &Variables<'_>, bytes: &[u8]) -> String {
    if let Ok(config) = Config::parse(bytes)
        && let Ok(attachment) = Attachment::read(variable)
        && let Some(request) = request(&config, &attachment, About::End)
    {
        let _told = ask(&config.settings.socket, &request, None, END_BOUND);
    }
    String::new()
}

/// `None`: there is nothing to ask.
fn request(config: &Config, attachment: &Attachment, about: About) -> Option<Request> {
    let pod = attachment.pod.as_ref()?;
    if config.settings.exempt_namespaces.contains(&pod.namespace) {
        return None;
    }
    Some(Request {
        about,
        namespace: pod.namespace.clone(),
        pod: pod.pod.clone(),
        uid: pod.uid.clone(),
        sandbox: attachment.container.clone(),
        addresses: config.addresses(),
    })
}

fn open_netns(path: String) -> Result<OwnedFd, What> {
    // What it is, the node program asks the kernel.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(path.as_str(), flags, Mode::empty()).map_err(|source| What::NetNs { path, source })
}

/// As the node program says. Where it says nothing, a pod stays out unless its namespace is known not to be enrolled.
fn decide(
    config: &Config,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    bound: Duration,
) -> Result<(), What> {
    let socket = &config.settings.socket;
    let what = match ask(socket, request, netns, bound) {
        Ok(Answer::Captured | Answer::NotEnrolled) => return Ok(()),
        Ok(Answer::Refused { reason }) => What::Refused { reason },
        Err(_) if is_not_enrolled(socket, &request.namespace) => return Ok(()),
        Err(error) => What::Ask(error),
    };
    match config.settings.fail_closed {
        true => Err(what),
        // Captured a little later, as without the plugin; the node program counts it.
        false => Ok(()),
    }
}

fn is_not_enrolled(socket: &Path, namespace: &str) -> bool {
    NotEnrolled::read(&NotEnrolled::path(socket)).is_some_and(|told| told.names.contains(namespace))
}
