//! Random processes killed at random moments over a queue of short jobs.

use std::time::{Duration, Instant};

use boxwright::adapters::{process, store};
use boxwright::job::state::JobState;

use crate::park::{Park, stub_job};
use crate::world::World;

/// Jobs in the queue.
const JOBS: usize = 50;
/// Kills, unless BOXWRIGHT_SOAK_KILLS says otherwise; the full figure is 200.
const KILLS: usize = 40;
/// Longest time for all of it.
const LIMIT: Duration = Duration::from_secs(900);

/// A generator of numbers that needs to be different, not good.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// The processes of trainers that run for a machine.
fn trainers(world: &World) -> Vec<u32> {
    world
        .records()
        .iter()
        .filter_map(|record| record.process)
        .filter(|p| process::is_alive(*p))
        .map(|p| p.pid)
        .collect()
}

#[test]
fn every_job_completes_exactly_once_whatever_is_killed() {
    let Some(mut park) = Park::with_store() else { return };
    let kills =
        std::env::var("BOXWRIGHT_SOAK_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    // Kills are the test's doing, so they must not use the budget up.
    park.more = "slots: {cpu: 2}\n".to_owned();
    let mut worlds = [park.machine("one"), park.machine("two")];
    for world in &mut worlds {
        let text = world.read("service.yaml").replace("killed: {budget: 3,", "killed: {budget: 1000,");
        world.write("service.yaml", text);
        world.start();
    }
    // The queue has to last as long as the killing.
    let stub = format!("steps={},pause=0.02", 25.max(kills * 5 / 8));
    for number in 0..JOBS {
        park.push(&[("config", &stub_job(&format!("job-{number}"), &stub))]);
    }
    let seed = std::env::var("BOXWRIGHT_SOAK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    let mut dice = Dice(seed);
    let began = Instant::now();
    let mut counts = [0usize; 4];
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(50 + dice.below(400)));
        let machine = dice.below(2) as usize;
        match dice.below(10) {
            0..=2 => {
                worlds[machine].kill_service();
                // Some restarts are quick, some come after the lease.
                std::thread::sleep(Duration::from_millis(dice.below(2) * 1500));
                worlds[machine].start();
                counts[0] += 1;
            }
            3..=7 => {
                let pids = trainers(&worlds[machine]);
                if let Some(&pid) = pids.get(dice.below(pids.len().max(1) as u64) as usize) {
                    process::signal_group(pid, libc::SIGKILL);
                    counts[1] += 1;
                }
            }
            8 => {
                park.redis.restart();
                counts[2] += 1;
            }
            _ => {
                if let Some(store) = &mut park.store {
                    store.run();
                    counts[3] += 1;
                }
            }
        }
    }
    let deadline = began + LIMIT;
    loop {
        let results = park.results();
        if results.len() >= JOBS {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{} of {JOBS} results\n{}\n{}",
            results.len(),
            worlds[0].logs(),
            worlds[1].logs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    println!(
        "{JOBS} jobs, {} kills (services {}, trainers {}, Redis {}, store {}) in {:.0} s",
        counts.iter().sum::<usize>(),
        counts[0],
        counts[1],
        counts[2],
        counts[3],
        began.elapsed().as_secs_f64()
    );
    for number in 0..JOBS {
        let results = park.results_of(&format!("job-{number}"));
        assert_eq!(results.len(), 1, "job-{number}: {results:?}");
        assert_eq!(results[0]["status"], "completed", "job-{number}: {results:?}");
        let completed = worlds
            .iter()
            .flat_map(World::records)
            .filter(|record| record.task_id.as_str() == format!("job-{number}"))
            .filter(|record| record.state == JobState::Completed)
            .count();
        assert_eq!(completed, 1, "job-{number} completed on one machine");
    }
    worlds[0].wait("an empty queue", || (park.queue_length() == 0).then_some(()));
    for world in &mut worlds {
        world.wait("an empty outbox", || {
            let status = world.run(&["status", "--services", "--json"]);
            let services: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
            services.as_array()?.iter().all(|line| line["waiting"] == 0).then_some(())
        });
        world.end_service(libc::SIGTERM);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let config = park.store.as_ref().expect("is there").config();
    let store = store::open(&config).expect("opens").expect("a store");
    for number in 0..JOBS {
        let manifest = runtime.block_on(crate::real::verified(&*store, &format!("job-{number}")));
        let manifest = manifest.unwrap_or_else(|| panic!("job-{number} has no manifest of a completed run"));
        let files = manifest["files"].as_array().expect("a list");
        assert!(files.iter().any(|file| file["role"] == "checkpoint"), "job-{number}: {manifest}");
    }
}
