// SPDX-License-Identifier: Apache-2.0
//! The CA against a real API server, with the rights that the chart gives it. One server for all: each part begins with
//! Podveil newly installed.

mod first_contact;
mod record;
mod replicas;
mod world;

use world::World;

macro_rules! parts {
    ($world:ident: $($part:path),+ $(,)?) => {{
        let mut failed = Vec::new();
        $(
            let began = std::time::Instant::now();
            $world.install()?;
            let outcome = $part(&mut $world).await;
            println!("{}: {outcome:?} ({:.1?})", stringify!($part), began.elapsed());
            if outcome.is_err() {
                failed.push(stringify!($part));
            }
        )+
        anyhow::ensure!(failed.is_empty(), "failed: {failed:?}");
        Ok(())
    }};
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cluster"]
async fn first_contact_on_a_real_api_server() -> anyhow::Result<()> {
    let mut world = World::new().await?;
    parts!(world:
        first_contact::the_token_of_a_program_s_own_pod_is_taken_and_says_the_node,
        first_contact::any_other_token_is_refused_with_its_reason_and_counted,
        first_contact::a_token_whose_pod_is_deleted_is_refused_although_it_was_taken_before,
        first_contact::a_node_gets_what_its_pods_are_and_a_request_ahead_of_the_watch_waits,
        first_contact::a_node_whose_pod_left_does_not_renew_its_own_svid,
        first_contact::without_the_api_server_a_new_token_is_unavailable_and_a_renewal_goes_on,
    )
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cluster"]
async fn the_record_on_a_real_api_server() -> anyhow::Result<()> {
    let mut world = World::new().await?;
    parts!(world:
        record::a_restart_keeps_the_root,
        record::edited_roots_are_repaired_and_other_keys_left,
        record::a_record_emptied_under_a_running_ca_is_written_again_and_a_lost_one_is_refused,
        record::a_record_deleted_under_a_running_ca_stops_changes_only_and_is_written_where_a_secret_is_made,
        record::nobody_else_reads_the_keys_and_everybody_the_roots,
        replicas::two_replicas_that_start_at_once_have_one_root_and_one_acts,
        replicas::a_rotation_waits_for_programs_of_every_replica,
        replicas::a_replica_that_runs_and_is_silent_stops_a_rotation_and_is_named,
        replicas::a_rotation_survives_the_replica_that_acts,
        record::a_ca_that_starts_before_its_api_server_says_what_it_waits_for_and_then_serves,
    )
}
