// SPDX-License-Identifier: Apache-2.0
use crate::{Authority, Leaf};

/// The answer's `cert_chain`: leaf, intermediate, and all roots together in the last element, each PEM block with its
/// trailing newline.
///
/// SPEC: Istio's clients read one block of each element but the last, and every block of the last as trust anchors.
pub fn chain<'a>(
    leaf: &Leaf,
    issuing: &Authority,
    roots: impl IntoIterator<Item = &'a Authority>,
) -> Vec<String> {
    let roots = roots.into_iter().map(Authority::certificate_pem).collect();
    vec![
        leaf.pem.clone(),
        issuing.certificate_pem().to_owned(),
        roots,
    ]
}
