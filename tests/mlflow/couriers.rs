//! Deliveries through a real courier and its outbox: what the server fails at holds back nothing else.

use std::sync::Arc;

use boxwright::actors::courier::Courier;
use boxwright::actors::keeper::Keeper;
use boxwright::adapters::queue::journal::Journal;
use boxwright::adapters::sink::Sink;
use boxwright::job::delivery::{Delivery, FilesMoment, MetricPoint, NewDelivery, RunRef, SinkName};
use boxwright::job::service::OutboxConfig;
use tokio::sync::Notify;

use crate::proxy::{Fault, Proxy};
use crate::world::*;

/// A life as it is put into the outbox.
fn life(run: &RunRef) -> Vec<Delivery> {
    let point = |step: i64| {
        let at_unix_ms = T0 + 1000 * step;
        metrics(run, vec![MetricPoint { key: "train/box_loss".into(), value: 0.5, at_unix_ms, step }])
    };
    vec![
        start(run, T0, &[("batch", "16")]),
        point(1),
        point(2),
        ended(run, "completed", T0 + 3000, 2),
        files(run, FilesMoment::End),
    ]
}

struct Office {
    keeper: Keeper,
    courier: Courier,
}

impl Office {
    /// A courier that tries again at once.
    fn open(sink: impl Sink + 'static, runs: &[&RunRef]) -> Self {
        let journal = Journal::in_memory().expect("opens");
        for run in runs {
            for (number, delivery) in life(run).into_iter().enumerate() {
                let new = NewDelivery {
                    sink: SinkName::Mlflow,
                    lane: run.instance.clone(),
                    key: format!("{}:{number}", run.instance),
                    may_be_dropped: false,
                    hold_ms: 0,
                    body: delivery.body,
                };
                journal.put_samples(&run.instance, vec![new]).expect("stored");
            }
        }
        let keeper = Keeper::start(journal).expect("starts");
        let config = OutboxConfig { items_max: 1000, delay_ms: 1, delay_ms_max: 20 };
        let (nudge, is_back) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let courier = Courier::start(Arc::new(sink), keeper.clone(), config, nudge, is_back).expect("starts");
        Self { keeper, courier }
    }

    /// Waits until so many deliveries are left.
    async fn wait_left(&self, count: usize) {
        let deadline = std::time::Instant::now() + PATIENT;
        loop {
            let left = self.keeper.with(|journal| journal.due(SinkName::Mlflow, i64::MAX, 100)).await;
            let left = left.expect("reads");
            if left.len() == count {
                return;
            }
            let left: Vec<_> = left.iter().map(|delivery| (&delivery.key, delivery.attempts)).collect();
            assert!(std::time::Instant::now() < deadline, "{count} should be left: {left:?}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    async fn close(self, world: &World) {
        self.courier.finish(PATIENT);
        world.until("the courier ends", || self.courier.is_finished()).await;
    }
}

#[test]
fn a_forbidden_experiment_holds_back_its_own_run_only() {
    with_server(async |world| {
        let proxy = Proxy::before(world.server.port);
        let (forbidden, allowed) = (run("forbidden"), run("allowed"));
        let study = forbidden.study_name.clone();
        proxy.plan_lines(move |line| match line.contains(&study) {
            true => Fault::Answer(403, ""),
            false => Fault::None,
        });
        let office = Office::open(sink_at(&proxy.url), &[&forbidden, &allowed]);
        office.wait_left(5).await;
        assert_eq!(world.only_run(&allowed.study_name).await.status(), "FINISHED");
        proxy.set(Fault::None);
        office.wait_left(0).await;
        let shown = world.only_run(&forbidden.study_name).await;
        assert_eq!(shown.status(), "FINISHED");
        let id = shown.0["info"]["run_id"].as_str().expect("an identity");
        assert_eq!(world.history(id, "train/box_loss").await.len(), 2);
        office.close(&world).await;
    });
}

#[test]
fn artifacts_and_a_registry_that_do_not_work_hold_back_no_status() {
    with_server(async |world| {
        for (fault, said) in [
            (Fault::Answer(500, ""), "does not work (status 500)"),
            (Fault::Answer(503, ""), "does not work (status 503)"),
            (Fault::Answer(403, ""), "credentials (status 403)"),
            (Fault::Answer(404, ""), "not an answer of a tracking server"),
            (Fault::Cut, "no answer"),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            for name in ["results.csv", "a.png", "b.png", "c.png", "d.png"] {
                std::fs::write(folder.path().join(name), name).expect("writable");
            }
            let proxy = Proxy::before(world.server.port);
            let broken = RunRef { run_dir: folder.path().to_owned(), ..run("broken") };
            let other = run("other");
            proxy.plan_lines(move |line| {
                let is_aside = ["mlflow-artifacts", "registered-models", "model-versions"]
                    .iter()
                    .any(|part| line.contains(part));
                if is_aside { fault } else { Fault::None }
            });
            let office = Office::open(sink_at(&proxy.url), &[&broken, &other]);
            office.wait_left(0).await;
            for run in [&broken, &other] {
                let shown = world.only_run(&run.study_name).await;
                assert_eq!(shown.status(), "FINISHED", "{fault:?}");
                let registry = shown.tag("boxwright.registry").unwrap_or_default();
                assert!(registry.starts_with("not registered") && registry.contains(said), "{registry}");
            }
            let shown = world.only_run(&broken.study_name).await;
            let files = shown.tag("boxwright.artifacts").unwrap_or_default();
            assert!(files.starts_with("0 files sent, 5 left out") && files.contains(said), "{files}");
            let puts = proxy.seen().iter().filter(|seen| seen.line.starts_with("PUT")).count();
            assert!((4..=64).contains(&puts), "{puts} requests");
            office.close(&world).await;
        }
    });
}

#[test]
fn an_outage_costs_no_try_and_no_file() {
    with_server(async |world| {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("results.csv"), "epoch").expect("writable");
        let proxy = Proxy::before(world.server.port);
        let run = RunRef { run_dir: folder.path().to_owned(), ..run("outage") };
        proxy.set(Fault::Answer(502, ""));
        let office = Office::open(sink_at(&proxy.url), &[&run]);
        // More tries than a step has, a question each whether the server does anything.
        world.until("many tries", || proxy.seen().len() > 140).await;
        proxy.set(Fault::None);
        office.wait_left(0).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.tag("boxwright.artifacts")), ("FINISHED", Some("1 files sent")));
        assert!(shown.tag("boxwright.registry").is_some_and(|said| said.starts_with("version 1")));
        office.close(&world).await;
    });
}
