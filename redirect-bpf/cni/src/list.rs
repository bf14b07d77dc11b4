// SPDX-License-Identifier: Apache-2.0
//! The list of plugins that a container runtime calls for each pod (`*.conflist`), as text: what is not ours keeps every
//! byte.

use crate::config::Settings;
use crate::plugin::PLUGIN;
use serde_json::{Value, json};

/// A configuration list of somebody else's.
#[derive(Clone, Copy, Debug)]
pub struct ConfList<'a>(&'a str);

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("it is no JSON")]
    Json(#[from] serde_json::Error),
    #[error("it is no list of plugins")]
    NoList,
    #[error("it has no plugin to be chained after")]
    Empty,
}

impl<'a> ConfList<'a> {
    pub fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The same list with our plugin last, once, with these settings. The very text where it is so already.
    /// # Errors
    /// [`ListError`]: nothing can be chained here.
    pub fn with(&self, settings: &Settings) -> Result<String, ListError> {
        let own = entry(settings);
        if is_last(self.0, &own)? {
            return Ok(self.0.to_owned());
        }
        let without = self.without()?;
        let end = end_of_plugins(&without).ok_or(ListError::NoList)?;
        let (before, after) = without.split_at(end);
        let with = format!("{before},\n{own}{after}");
        // Believed only if it reads as it should.
        if is_last(&with, &own)?
            && plugins(&parse(&without)?)?.len() + 1 == plugins(&parse(&with)?)?.len()
        {
            return Ok(with);
        }
        Err(ListError::NoList)
    }

    /// The same list without our plugin. Byte for byte what it was before [`Self::with`]; otherwise written anew.
    /// # Errors
    /// [`ListError`]: it cannot be in there.
    pub fn without(&self) -> Result<String, ListError> {
        let mut list = parse(self.0)?;
        let before = plugins(&list)?.len();
        let others: Vec<Value> = (plugins(&list)?.iter())
            .filter(|plugin| !is_ours(plugin))
            .cloned()
            .collect();
        if others.is_empty() {
            return Err(ListError::Empty);
        }
        if others.len() == before {
            return Ok(self.0.to_owned());
        }
        list["plugins"] = others.into();
        let cut = cut(self.0).filter(|text| parse(text).is_ok_and(|cut| cut == list));
        Ok(cut.unwrap_or_else(|| format!("{list:#}\n")))
    }

    /// Is our plugin in there, anywhere?
    pub fn is_with(&self) -> bool {
        parse(self.0).is_ok_and(|list| plugins(&list).is_ok_and(|all| all.iter().any(is_ours)))
    }
}

fn parse(text: &str) -> Result<Value, ListError> {
    Ok(serde_json::from_str(text)?)
}

fn plugins(list: &Value) -> Result<&Vec<Value>, ListError> {
    let plugins = list["plugins"].as_array().ok_or(ListError::NoList)?;
    match plugins.is_empty() {
        true => Err(ListError::Empty),
        false => Ok(plugins),
    }
}

fn entry(settings: &Settings) -> Value {
    let mut entry = json!(settings);
    entry["type"] = PLUGIN.into();
    entry
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn is_last(text: &str, own: &Value) -> Result<bool, ListError> {
    let list = parse(text)?;
    let plugins = plugins(&list)?;
    let ours = plugins.iter().filter(|plugin| is_ours(plugin)).count();
    Ok(ours == 1 && plugins.last() == Some(own))
}

/// What [`ConfList::with`] put in is one line that begins as only it does, after the comma that ends the line before.
fn cut(text: &str) -> Option<String> {
    let mark = format!("\"type\":\"{PLUGIN}\"");
    let found = text.rfind(&mark)?;
    let start = text[..found].rfind(",\n{")?;
    let end = found + text[found..].find('}')? + 1;
    Some(format!("{}{}", &text[..start], &text[end..]))
}

/// Where the last plugin ends: behind it, before the space and the bracket that end the list.
fn end_of_plugins(text: &str) -> Option<usize> {
    let (mut depth, mut in_plugins, mut last) = (0usize, false, None);
    let mut key = None;
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = end_of_string(bytes, at)?;
                if depth == 1 && !in_plugins {
                    key = Some(&text[at + 1..end - 1]);
                }
                at = end;
                continue;
            }
            b'{' | b'[' => {
                if bytes[at] == b'[' && depth == 1 && key == Some("plugins") {
                    in_plugins = true;
                }
                depth += 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                if in_plugins && depth == 1 {
                    return last;
                }
                if in_plugins && depth == 2 {
                    last = Some(at + 1);
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// One past the closing quote of the string that begins at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(fail_closed: bool) -> Settings {
        Settings {
            socket: "/run/podveil/cni/cni.sock".into(),
            fail_closed,
            exempt_namespaces: vec!["kube-system".into(), "podveil-system".into()],
        }
    }

    const LISTS: [&str; 4] = [
        "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\",\n       \"log-file\": \"/var/run/cilium/cilium-cni.log\"\n    }\n  ]\n}\n",
        r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"},"policy":{"a":[1,{"b":2}]}},{"type":"portmap","snat":true}],"cniVersion":"0.4.0"}"#,
        // A value that looks like the key, and brackets and quotes in strings.
        r#"{"name":"plugins","disableCheck":false,"plugins" : [ {"type":"a","x":"]}\"[{"} ] , "other":["plugins",{"plugins":[]}]}"#,
        r#"{"cniVersion":"1.1.0","name":"kindnet","plugins":[{"type":"ptp"}
        ,
        {"type":"portmap"}]}"#,
    ];

    #[test]
    fn our_plugin_is_the_last_of_the_list_and_leaves_every_byte_as_it_was() {
        for text in LISTS {
            let with = ConfList::new(text).with(&settings(true)).unwrap();
            let (before, after) = (parse(text).unwrap(), parse(&with).unwrap());
            let (before, after) = (plugins(&before).unwrap(), plugins(&after).unwrap());
            assert_eq!(after[..before.len()], before[..], "{with}");
            assert_eq!(after[before.len()..], [entry(&settings(true))], "{with}");
            assert!(ConfList::new(&with).is_with() && !ConfList::new(text).is_with());
            // Again, and with other settings: still once.
            assert_eq!(ConfList::new(&with).with(&settings(true)).unwrap(), with);
            let other = ConfList::new(&with).with(&settings(false)).unwrap();
            assert_ne!(other, with);
            for with in [with, other] {
                assert_eq!(ConfList::new(&with).without().unwrap(), text);
            }
            assert_eq!(ConfList::new(text).without().unwrap(), text);
        }
    }

    #[test]
    fn an_entry_that_was_written_otherwise_or_stands_elsewhere_is_taken_out_too() {
        let text = r#"{"plugins": [{"type": "ptp"}, {"socket": "/old", "type": "podveil-cni"}, {"type": "portmap"}]}"#;
        let without = ConfList::new(text).without().unwrap();
        let list = parse(&without).unwrap();
        assert_eq!(
            list,
            json!({"plugins": [{"type": "ptp"}, {"type": "portmap"}]})
        );
        let with = ConfList::new(text).with(&settings(true)).unwrap();
        assert!(is_last(&with, &entry(&settings(true))).unwrap());
        assert_eq!(ConfList::new(&with).without().unwrap(), without);
    }

    #[test]
    fn what_is_no_list_is_left_alone() {
        for text in [
            "",
            "{",
            "[]",
            r#"{"type": "ptp"}"#,
            r#"{"plugins": {}}"#,
            r#"{"plugins": []}"#,
            r#"{"plugins": [{"type": "podveil-cni"}]}"#,
        ] {
            assert!(ConfList::new(text).with(&settings(true)).is_err(), "{text}");
        }
    }
}
