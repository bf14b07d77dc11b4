// SPDX-License-Identifier: Apache-2.0
//! The program as a container runtime calls it, before a node program of the test's own.

use podveil_cni::NotEnrolled;
use podveil_cni::wire::{About, Answer, MAX_PACKET_BYTES, Request};
use podveil_netns::NetNs;
use podveil_netns::seqpacket::Listener;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=s-1;K8S_POD_UID=u-1";

/// A call of the plugin; `run` makes it.
struct Call {
    verb: &'static str,
    config: Value,
    arguments: String,
    without: Option<&'static str>,
}

impl Call {
    fn new(verb: &'static str, socket: &Path) -> Self {
        let config = json!({
            "cniVersion": "1.1.0",
            "name": "pods",
            "type": "podveil-cni",
            "socket": socket,
            "failClosed": true,
            "exemptNamespaces": ["kube-system", "podveil-system"],
            "prevResult": previous("1.1.0"),
        });
        Self {
            verb,
            config,
            arguments: ARGS.to_owned(),
            without: None,
        }
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    fn of_namespace(mut self, namespace: &str) -> Self {
        self.arguments = ARGS.replace("shop", namespace);
        self
    }

    /// What it wrote, and whether it succeeded.
    fn run(&self) -> (String, bool) {
        self.run_with_input(self.config.to_string().as_bytes())
    }

    fn run_with_input(&self, input: &[u8]) -> (String, bool) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podveil-cni"));
        command.env_clear();
        for (name, value) in [
            ("CNI_COMMAND", self.verb),
            ("CNI_CONTAINERID", "s-1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/proc/self/ns/net"),
            ("CNI_PATH", "/opt/cni/bin"),
            ("CNI_ARGS", &self.arguments),
        ] {
            if self.without != Some(name) {
                command.env(name, value);
            }
        }
        let mut plugin = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may end before it has read everything.
        let _written = plugin.stdin.take().unwrap().write_all(input);
        let output = plugin.wait_with_output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}");
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.success(),
        )
    }

    /// The error object that it wrote.
    fn fails(&self) -> Value {
        let (text, succeeded) = self.run();
        assert!(!succeeded, "{text}");
        error(&text)
    }

    fn passes(&self) {
        let (text, succeeded) = self.run();
        assert!(succeeded, "{text}");
        let result: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(result, self.config["prevResult"]);
    }
}

fn error(text: &str) -> Value {
    let error: Value = serde_json::from_str(text).unwrap();
    assert!(error["code"].is_u64() && error["msg"].is_string(), "{text}");
    error
}

/// As the plugins before write it in each version.
fn previous(version: &str) -> Value {
    let mut result = json!({
        "cniVersion": version,
        "interfaces": [{"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/run/netns/cni-1"}],
        "ips": [{"address": "10.244.1.2/24", "gateway": "10.244.1.1", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
        "anything": {"else": 18446744073709551615u64},
    });
    if version.starts_with('0') {
        result["ips"][0]["version"] = "4".into();
    }
    result
}

/// What the node program of the test does with whoever asks.
enum Node {
    Answers(Vec<u8>),
    Closes,
    Silent,
}

/// Who asked, and whose network namespace came with it.
type Asked = Receiver<(Request, Option<NetNs>)>;

/// Serves one client in a folder of its own.
fn node(node: Node) -> (tempfile::TempDir, PathBuf, Asked) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cni/cni.sock");
    let (sender, asked) = sync_channel(1);
    let (ready, is_ready) = sync_channel(1);
    let bound = path.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = Listener::bind(&bound).unwrap();
            ready.send(()).unwrap();
            let client = listener.accept().await.unwrap();
            let mut packet = client.recv(MAX_PACKET_BYTES).await.unwrap().unwrap();
            let netns = packet.fds.pop().map(|fd| NetNs::from_fd(fd).unwrap());
            assert!(packet.fds.is_empty());
            sender
                .send((Request::decode(&packet.bytes).unwrap(), netns))
                .unwrap();
            match node {
                Node::Answers(answer) => client.send(&answer, &[]).await.unwrap(),
                Node::Closes => {}
                // Until the plugin has given up.
                Node::Silent => assert!(client.recv(1).await.unwrap().is_none()),
            }
        });
    });
    is_ready.recv().unwrap();
    (folder, path, asked)
}

fn answers(answer: Answer) -> Node {
    Node::Answers(answer.encode())
}

#[test]
fn a_pod_that_may_start_gets_the_result_before_in_each_version() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        for answer in [Answer::Captured, Answer::NotEnrolled] {
            let (_folder, socket, asked) = node(answers(answer));
            Call::new("ADD", &socket)
                .with("cniVersion", version)
                .with("prevResult", previous(version))
                .passes();
            let (request, netns) = asked.recv().unwrap();
            let expected = Request {
                about: About::Start,
                namespace: "shop".into(),
                pod: "web".into(),
                uid: "u-1".into(),
                sandbox: "s-1".into(),
                addresses: vec!["10.244.1.2".parse().unwrap()],
            };
            assert_eq!(request, expected);
            assert_eq!(netns.unwrap().id(), NetNs::current().unwrap().id());
        }
    }
}

#[test]
fn a_pod_that_must_not_start_fails_with_the_reason_and_what_to_do() {
    let reason = "the proxy has not taken it yet".to_owned();
    let refused = answers(Answer::Refused { reason });
    let (_folder, socket, _asked) = node(refused);
    let error = Call::new("ADD", &socket)
        .with("cniVersion", "1.0.0")
        .fails();
    assert_eq!(
        (&error["cniVersion"], &error["code"]),
        (&json!("1.0.0"), &json!(11))
    );
    let text = error["msg"].as_str().unwrap();
    assert!(text.ends_with("the proxy has not taken it yet"), "{text}");
    let details = error["details"].as_str().unwrap();
    assert!(
        details.contains("io.cilium/mtls-enabled=false"),
        "{details}"
    );
}

#[test]
fn a_node_program_that_cannot_answer_stops_a_pod_only_where_that_is_set() {
    let nobody = tempfile::tempdir().unwrap().path().join("cni/cni.sock");
    let nonsense = Node::Answers(b"{}".to_vec());
    let long = Node::Answers(vec![b' '; MAX_PACKET_BYTES + 1]);
    for (server, said) in [
        (None, "it cannot be reached at"),
        (Some(Node::Closes), "without an answer"),
        (Some(nonsense), "not understood"),
        (Some(long), "not understood"),
        (Some(Node::Silent), "did not answer in time"),
    ] {
        let server = server.map(node);
        let socket = server.as_ref().map_or(&nobody, |(_, socket, _)| socket);
        // A silent one is waited for longer where a pod is to start.
        let verb = if said.contains("in time") {
            "CHECK"
        } else {
            "ADD"
        };
        let error = Call::new(verb, socket).fails();
        assert_eq!(error["code"], 11);
        let text = error["msg"].as_str().unwrap();
        assert!(text.contains(said), "{text}");
        let details = error["details"].as_str().unwrap();
        assert!(details.contains("node.cni.failClosed=false"), "{details}");
    }
    Call::new("ADD", &nobody).with("failClosed", false).passes();
    // Nobody is asked about these.
    for namespace in ["kube-system", "podveil-system"] {
        Call::new("ADD", &nobody).of_namespace(namespace).passes();
    }
    let mut no_pod = Call::new("ADD", &nobody);
    no_pod.arguments = "IgnoreUnknown=1".to_owned();
    no_pod.passes();
}

#[test]
fn without_the_node_program_only_pods_of_namespaces_that_are_or_may_be_enrolled_stay_out() {
    let told = NotEnrolled {
        version: "7.0".into(),
        names: ["other".to_owned()].into(),
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let add = |namespace| Call::new("ADD", &socket).of_namespace(namespace);
    assert_eq!(add("other").fails()["code"], 11, "nobody has told");
    std::fs::write(NotEnrolled::path(&socket), told.encode()).unwrap();
    add("other").passes();
    for namespace in ["shop", "made-since"] {
        assert_eq!(add(namespace).fails()["code"], 11);
    }
    // Whom it answers, it answers for.
    let reason = "not yet".to_owned();
    let (_folder, socket, _asked) = node(answers(Answer::Refused { reason }));
    std::fs::write(NotEnrolled::path(&socket), told.encode()).unwrap();
    let error = Call::new("ADD", &socket).of_namespace("other").fails();
    assert!(
        error["msg"].as_str().unwrap().ends_with("not yet"),
        "{error}"
    );
}

#[test]
fn the_other_verbs_do_what_the_specification_says() {
    let nobody = tempfile::tempdir().unwrap().path().join("cni/cni.sock");
    // A sandbox ends whoever hears of it; nothing is kept; a node is ready for the namespaces that are not asked about.
    for verb in ["DEL", "GC", "STATUS"] {
        assert_eq!(
            Call::new(verb, &nobody).run(),
            (String::new(), true),
            "{verb}"
        );
    }
    let (_folder, socket, asked) = node(answers(Answer::NotEnrolled));
    let mut end = Call::new("DEL", &socket);
    end.without = Some("CNI_NETNS");
    assert_eq!(end.run(), (String::new(), true));
    let (request, netns) = asked.recv().unwrap();
    assert!(
        request.about == About::End && netns.is_none(),
        "{request:?}"
    );

    let (_folder, socket, asked) = node(answers(Answer::Captured));
    assert_eq!(Call::new("CHECK", &socket).run(), (String::new(), true));
    assert_eq!(asked.recv().unwrap().0.about, About::Now);
    let reason = "gone".to_owned();
    let (_folder, socket, _asked) = node(answers(Answer::Refused { reason }));
    assert_eq!(Call::new("CHECK", &socket).fails()["code"], 11);

    let (text, succeeded) = Call::new("VERSION", &nobody)
        .with("cniVersion", "1.0.0")
        .run();
    let expected = json!({
        "cniVersion": "1.0.0",
        "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    });
    assert!(succeeded);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
}

#[test]
fn a_call_that_is_not_as_it_should_be_fails_with_the_specifications_code() {
    let nobody = tempfile::tempdir().unwrap().path().join("cni/cni.sock");
    let add = || Call::new("ADD", &nobody);
    let unset = |name| {
        let mut call = add();
        call.without = Some(name);
        call
    };
    let mut bad_arguments = add();
    bad_arguments.arguments = "K8S_POD_NAMESPACE".to_owned();
    let mut unchained = add();
    unchained
        .config
        .as_object_mut()
        .unwrap()
        .remove("prevResult");
    for (call, code) in [
        (add().with("cniVersion", "0.2.0"), 1),
        (add().with("cniVersion", "2.0.0"), 1),
        (Call::new("STATUS", &nobody).with("cniVersion", "9"), 1),
        (Call::new("NONE", &nobody), 4),
        (unset("CNI_COMMAND"), 4),
        (unset("CNI_CONTAINERID"), 4),
        (unset("CNI_IFNAME"), 4),
        (unset("CNI_NETNS"), 4),
        (bad_arguments, 4),
        (add().with("socket", 7), 6),
        (unchained, 7),
    ] {
        let error = call.fails();
        assert_eq!(error["code"], code, "{error}");
    }
    let call = add();
    for input in [&b""[..], b"{", b"\xff", &vec![b'['; 2 << 20]] {
        let (text, succeeded) = call.run_with_input(input);
        assert!(!succeeded);
        assert_eq!(error(&text)["code"], 6, "{text}");
    }
}
