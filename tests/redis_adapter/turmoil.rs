//! Machines that die at any step, and a server that is killed under them: every job ends once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use boxwright::adapters::queue::redis::{Acquired, Fleet, FleetError, Published, Renewed, Retry, Taken};
use boxwright::job::delivery::{ResultBody, RunRef};
use boxwright::job::service::RedisConfig;
use serde_json::json;

use super::{TOPIC, config, get, push, ready, run, task};
use crate::servers::redis::RedisServer;

const JOBS: usize = 60;
const LEASE_MS: u64 = 150;

/// A small generator: the course of a test is a function of its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Where a machine died.
struct Died;

enum Ending {
    Died,
    Failed(FleetError),
}

impl From<FleetError> for Ending {
    fn from(error: FleetError) -> Self {
        Self::Failed(error)
    }
}

impl From<Died> for Ending {
    fn from(_: Died) -> Self {
        Self::Died
    }
}

fn may_die(dice: &mut Dice) -> Result<(), Died> {
    if dice.roll(25) == 0 { Err(Died) } else { Ok(()) }
}

async fn work_on(fleet: &Fleet, taken: &Taken, dice: &mut Dice) -> Result<(), Ending> {
    let name = taken.fields["config_path"].clone();
    let instance = taken.original_id.clone();
    if fleet.is_done(&instance).await? {
        fleet.acknowledge(&taken.entry).await?;
        return Ok(());
    }
    may_die(dice)?;
    let fence = match fleet.acquire(&task(&name), &instance, LEASE_MS).await? {
        Acquired::Mine { fence, .. } => fence,
        Acquired::Held { owner, .. } => {
            fleet.hand_over(&taken.entry, &owner).await?;
            return Ok(());
        }
    };
    for _ in 0..dice.roll(4) {
        may_die(dice)?;
        tokio::time::sleep(Duration::from_millis(dice.roll(60))).await;
        fleet.renew_entries(std::slice::from_ref(&taken.entry)).await?;
        if fleet.renew(&task(&name), &instance, fence, 1, LEASE_MS).await? != Renewed::Mine {
            return Ok(());
        }
    }
    let body = ResultBody {
        run: RunRef {
            task_id: task(&name),
            instance,
            study_name: "s".into(),
            version: None,
            trial_number: 1,
            kind: "yolo".into(),
            run_dir: "/r".into(),
            fence,
            machine_id: fleet.machine_id().to_owned(),
        },
        message: json!({"task_id": name, "status": "completed", "attempt": 1, "fitness": 0.5}),
        entry: Some(taken.entry.clone()),
    };
    may_die(dice)?;
    let outcome = fleet.publish_result(&body, fence).await?;
    assert!(matches!(outcome, Published::Published | Published::Duplicate | Published::Fenced { .. }));
    may_die(dice)?;
    Ok(())
}

/// One life of a machine: what it had taken first, then new work.
async fn live(fleet: &Fleet, dice: &mut Dice, until: Instant) -> Result<(), Ending> {
    for taken in fleet.own_pending(10).await? {
        work_on(fleet, &taken, dice).await?;
    }
    while Instant::now() < until {
        let mut taken = fleet.take(1, 0, &[]).await?;
        taken.extend(fleet.steal(LEASE_MS, 1).await?.entries);
        may_die(dice)?;
        for taken in taken {
            work_on(fleet, &taken, dice).await?;
        }
        fleet.wait_for_work(20, &[]).await?;
    }
    Ok(())
}

async fn machine(config: RedisConfig, name: String, seed: u64, until: Instant, died: Arc<AtomicUsize>) {
    let mut dice = Dice(seed);
    let mut deaths = 0;
    loop {
        let fleet = Fleet::new(&config, &name, &format!("{name}-{deaths}")).expect("a handle");
        match live(&fleet, &mut dice, until).await {
            Ok(()) => return,
            Err(Ending::Died) => {
                deaths += 1;
                died.fetch_add(1, Ordering::Relaxed);
            }
            Err(Ending::Failed(error)) if error.is_no_group() => drop(fleet.ensure_groups().await),
            Err(Ending::Failed(error)) => {
                assert!(error.retry() != Retry::Never, "{}", error.chain());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        if Instant::now() >= until {
            return;
        }
    }
}

/// How often each job has a result.
fn results(server: &RedisServer) -> BTreeMap<String, usize> {
    let rows: Vec<(String, BTreeMap<String, String>)> =
        run(server, &["XRANGE", "results_queue", "-", "+"]).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for (_, fields) in rows {
        *counts.entry(fields["task_id"].clone()).or_insert(0) += 1;
    }
    counts
}

async fn turmoil(mut server: RedisServer, kills: usize) {
    ready(&server, "m0").await;
    for i in 0..JOBS {
        let priority: &[&str] = if i % 5 == 0 { &["priority", "high"] } else { &[] };
        push(&server, &format!("job{i}"), priority);
    }
    let until = Instant::now() + Duration::from_secs(60);
    let mut machines = tokio::task::JoinSet::new();
    let died = Arc::new(AtomicUsize::new(0));
    for i in 0..3 {
        machines.spawn(machine(config(&server), format!("m{i}"), 7 + i, until, died.clone()));
    }
    for _ in 0..kills {
        tokio::time::sleep(Duration::from_millis(150)).await;
        server.kill();
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.start_again();
    }
    loop {
        let counts = results(&server);
        if counts.len() == JOBS && get::<usize>(&server, &["XLEN", TOPIC]) == 0 {
            break;
        }
        assert!(Instant::now() < until, "{} of {JOBS} jobs ended", counts.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    machines.abort_all();
    while let Some(ended) = machines.join_next().await {
        assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()), "a machine panicked");
    }
    assert!(died.load(Ordering::Relaxed) >= 5, "{died:?} deaths");
    let counts = results(&server);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    for stream in [TOPIC, "training_queue:high", "training_queue:low"] {
        assert_eq!(get::<usize>(&server, &["XLEN", stream]), 0, "{stream}");
    }
}

#[tokio::test]
async fn machines_that_die_at_any_step_leave_every_job_done_once() {
    let Some(server) = RedisServer::start() else { return };
    turmoil(server, 0).await;
}

#[tokio::test]
async fn a_server_that_is_killed_again_and_again_loses_no_job() {
    let Some(server) = RedisServer::start_durable() else { return };
    turmoil(server, 8).await;
}
