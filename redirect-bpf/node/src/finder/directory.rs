// SPDX-License-Identifier: Apache-2.0
use super::{By, FindError, Found};
use crate::Obstacle;
use podveil_model::Uid;
use podveil_netns::{NetNs, NetNsError};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

/// Opens the file of the pod's uid in `directory`.
pub fn find(directory: &Path, uid: &Uid) -> Result<Found, FindError> {
    let name: &str = &uid.0;
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(legal) {
        return Err(FindError::BadUid { uid: uid.clone() });
    }
    let path = directory.join(name);
    let missing = || FindError::Missing {
        what: format!("there is no network namespace at {}", path.display()),
        obstacle: Obstacle::NotFound,
    };
    let netns = match NetNs::open(&path) {
        Ok(netns) => netns,
        Err(NetNsError::Open { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Err(missing());
        }
        // `ip netns` binds the namespace onto an empty file a moment after it has made that.
        Err(NetNsError::NotANetNs) => return Err(missing()),
        Err(error) => return Err(FindError::NetNs(error)),
    };
    let own = NetNs::current().map_err(FindError::NetNs)?;
    if own.id() == netns.id() {
        return Err(FindError::Own { path });
    }
    Ok(Found {
        netns: Arc::new(netns),
        anchor: None,
        by: By::Directory,
        addresses: Arc::default(),
    })
}

/// All that lies in `directory`, by path.
pub fn all(directory: &Path) -> Result<Vec<(String, Found)>, FindError> {
    let listing = fs::read_dir(directory).map_err(|source| FindError::List {
        path: directory.to_owned(),
        source,
    })?;
    let own = NetNs::current().map_err(FindError::NetNs)?;
    let open = |path: &Path| {
        NetNs::open(path)
            .ok()
            .filter(|found| found.id() != own.id())
    };
    Ok(listing
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let netns = Arc::new(open(&path)?);
            let found = Found {
                netns,
                anchor: None,
                by: By::Directory,
                addresses: Arc::default(),
            };
            Some((path.display().to_string(), found))
        })
        .collect())
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
