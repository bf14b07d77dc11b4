// SPDX-License-Identifier: Apache-2.0
//! What nft itself shows of a script when nobody has touched the table: the one form in which rules that were written and
//! rules that stand can be compared.

use crate::backend::ApplyError;
use crate::command::run_in;
use nix::sched::{CloneFlags, unshare};
use podveil_netns::NetNs;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Pods differ by their ports and by whether they refuse plaintext, so that a node has a handful of scripts. Past this
/// many all are forgotten.
const MAX_SCRIPTS: usize = 256;

/// The chains of a table with their rules, as far as they decide anything.
pub type Chains = BTreeMap<String, Vec<Value>>;

/// References by script, each made once, in a namespace that nobody else has.
#[derive(Clone, Debug, Default)]
pub struct References(Arc<Mutex<BTreeMap<String, Arc<Chains>>>>);

impl References {
    pub async fn of(&self, script: &str) -> Result<Arc<Chains>, ApplyError> {
        let mut known = self.0.lock().await;
        if let Some(chains) = known.get(script) {
            return Ok(chains.clone());
        }
        let scratch = scratch()?;
        run_in(&scratch, "nft", &["-f", "-"], script).await?;
        let arguments = ["-j", "-t", "list", "table", "inet", "podveil"];
        let listing = run_in(&scratch, "nft", &arguments, "").await?;
        let listing = serde_json::from_slice(&listing).map_err(|source| ApplyError::Output {
            program: "nft",
            source,
        })?;
        if known.len() >= MAX_SCRIPTS {
            known.clear();
        }
        let chains = Arc::new(chains(&listing));
        known.insert(script.to_owned(), chains.clone());
        Ok(chains)
    }
}

/// Takes the chains out of a listing: hooks first, then the rules in order, without the kernel's own numbers.
pub fn chains(listing: &Value) -> Chains {
    let mut chains = Chains::new();
    for item in listing["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = item.get("chain") {
            let place = json!([chain["type"], chain["hook"], chain["prio"], chain["policy"]]);
            chains
                .entry(name(&chain["name"]))
                .or_default()
                .insert(0, place);
        } else if let Some(rule) = item.get("rule") {
            let mut expression = rule["expr"].clone();
            sort_sets(&mut expression);
            let rules = chains.entry(name(&rule["chain"])).or_default();
            rules.push(json!([rule["comment"], expression]));
        }
    }
    chains
}

fn name(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A set has no order.
fn sort_sets(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(sort_sets),
        Value::Object(fields) => {
            for (key, field) in fields {
                sort_sets(field);
                if let (true, Value::Array(elements)) = (key == "set", field) {
                    elements.sort_by_cached_key(Value::to_string);
                }
            }
        }
        _ => {}
    }
}

/// A namespace of nobody's, gone with its descriptor.
pub fn scratch() -> Result<NetNs, ApplyError> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        NetNs::current().map_err(io::Error::other)
    });
    made.join()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        .map_err(ApplyError::Scratch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_decides_is_compared() {
        let listing = |handle: u32, ports: [u16; 2], verdict: &str| {
            chains(&json!({"nftables": [
                {"metainfo": {"version": "1.0.6"}},
                {"chain": {"name": "c", "handle": handle, "type": "nat", "hook": "output", "prio": -100}},
                {"rule": {"chain": "c", "handle": handle, "comment": "x", "expr": [
                    {"match": {"right": {"set": ports}}},
                    {verdict: null},
                ]}},
            ]}))
        };
        let written = listing(1, [25, 5432], "return");
        assert_eq!(written, listing(7, [5432, 25], "return"));
        assert_ne!(written, listing(1, [25, 5433], "return"));
        assert_ne!(written, listing(1, [25, 5432], "accept"));
    }
}
