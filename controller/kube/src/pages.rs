// SPDX-License-Identifier: Apache-2.0
use kube::Api;
use kube::api::ListParams;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// Lists once, as many objects at a time as `page` says: a list is as long as the cluster is large.
///
/// # Errors
/// Of the API; what was handed over by then is not all.
pub async fn each<K>(
    api: &Api<K>,
    mut page: ListParams,
    mut take: impl FnMut(K),
) -> kube::Result<()>
where
    K: Clone + Debug + DeserializeOwned,
{
    loop {
        let list = api.list(&page).await?;
        list.items.into_iter().for_each(&mut take);
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(()),
        }
    }
}
