// SPDX-License-Identifier: Apache-2.0
use podveil_model::Uid;
use podveil_netns::{NetNs, NetNsError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("uid {uid:?} cannot be a file name")]
    BadUid { uid: Uid },
    #[error("there is no network namespace at {path}")]
    Missing { path: PathBuf },
    #[error("the pod's network namespace cannot be taken")]
    NetNs(#[source] NetNsError),
    #[error("{path} is this program's own network namespace")]
    Own { path: PathBuf },
}

/// Opens the namespace of a pod: the file of its uid in `directory`.
/// # Errors
/// See [`FindError`]. The node's own namespace is never a pod's.
pub fn find(directory: &Path, uid: &Uid) -> Result<NetNs, FindError> {
    let name: &str = &uid.0;
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(legal) {
        return Err(FindError::BadUid { uid: uid.clone() });
    }
    let path = directory.join(name);
    let netns = match NetNs::open(&path) {
        Ok(netns) => netns,
        Err(NetNsError::Open { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Err(FindError::Missing { path });
        }
        // `ip netns` binds the namespace onto an empty file a moment after it has made that.
        Err(NetNsError::NotANetNs) => return Err(FindError::Missing { path }),
        Err(error) => return Err(FindError::NetNs(error)),
    };
    let own = NetNs::current().map_err(FindError::NetNs)?;
    if own.id() == netns.id() {
        return Err(FindError::Own { path });
    }
    Ok(netns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_that_leaves_the_directory_is_refused() {
        for uid in ["", "..", "../net", "a/b", ".hidden", "a b"] {
            let found = find(Path::new("/proc/self/ns"), &uid.into());
            assert!(matches!(found, Err(FindError::BadUid { .. })), "{uid}");
        }
    }

    #[test]
    fn what_is_no_pods_namespace_is_refused() {
        let directory = Path::new("/proc/self/ns");
        assert!(matches!(
            find(directory, &"absent".into()),
            Err(FindError::Missing { .. })
        ));
        assert!(matches!(
            find(directory, &"uts".into()),
            Err(FindError::Missing { .. })
        ));
        assert!(matches!(
            find(directory, &"net".into()),
            Err(FindError::Own { .. })
        ));
    }
}
