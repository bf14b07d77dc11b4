// SPDX-License-Identifier: Apache-2.0
//! Controllers on a real API server, with the rights that the chart gives them, and nodes that take what they say into
//! the proxy's own state. What a connection would become is asked of that state.

#[path = "../it/authorities.rs"]
mod authorities;
mod enrolment;
mod node;
mod objects;
mod replicas;
mod traps;
mod uninstall;
mod world;

use world::World;

/// One server, two replicas and two nodes for all; each part has namespaces of its own.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "cluster"]
async fn the_controller_on_a_real_api_server() -> anyhow::Result<()> {
    let mut world = World::start().await?;
    let mut failed = Vec::new();
    macro_rules! parts {
        ($($part:path),+ $(,)?) => {$(
            let began = std::time::Instant::now();
            let outcome = $part(&mut world).await;
            println!("{}: {outcome:?} ({:.1?})", stringify!($part), began.elapsed());
            if outcome.is_err() {
                failed.push(stringify!($part));
            }
        )+};
    }
    parts!(
        traps::every_address_of_a_service_leads_to_an_endpoint,
        traps::endpoints_are_chosen_as_the_service_says,
        traps::endpoints_without_pods_and_services_without_endpoints,
        traps::an_address_belongs_to_the_pod_that_has_it_now,
        enrolment::a_label_removed_and_a_namespace_deleted_are_two_ends,
        enrolment::bad_input_has_an_answer_and_harms_nobody_else,
        enrolment::a_node_says_why_a_pod_is_not_captured,
        enrolment::a_strict_namespace_is_told_what_the_api_server_dials_in_it,
        enrolment::nothing_is_begun_where_cilium_encrypts,
        replicas::a_token_opens_no_stream,
        replicas::both_replicas_reach_the_same_states,
        replicas::a_node_that_changes_replica_gets_only_what_changed,
        replicas::pods_that_flap_make_no_storm_of_events_and_one_replica_writes_them,
        // Last: it takes a node away.
        uninstall::a_silent_node_is_waited_for_and_named,
    );
    anyhow::ensure!(failed.is_empty(), "failed: {failed:?}");
    Ok(())
}
