//! Several machines and one run.

use boxwright::adapters::sink::{DeliveryError, Sink};
use boxwright::job::delivery::RunRef;

use crate::proxy::{Fault, Proxy};
use crate::world::*;

fn taken_over(run: &RunRef) -> RunRef {
    RunRef { fence: run.fence + 1, machine_id: "machine-b".into(), ..run.clone() }
}

#[test]
fn a_second_machine_goes_on_in_the_run_and_the_first_is_fenced_off() {
    with_server(async |world| {
        let (a, b, run) = (world.sink(), world.sink(), run("takeover"));
        deliver_all(&a, &[start(&run, T0, &[]), epoch(&run, 1, T0 + 1000), epoch(&run, 2, T0 + 2000)], 0)
            .await;
        let other = taken_over(&run);
        // Its clock is an hour behind.
        let back = T0 - 3_600_000;
        deliver_all(&b, &[start(&other, back, &[]), epoch(&other, 2, back), epoch(&other, 3, back + 1)], 0)
            .await;
        for late in
            [epoch(&run, 4, T0 + 9000), start(&run, T0 + 9000, &[]), ended(&run, "failed", T0 + 9000, 4)]
        {
            let error = a.deliver(&late).await.expect_err("fenced");
            let DeliveryError::Fenced { owner, fence } = error else { panic!("{error:?}") };
            assert_eq!((owner.as_str(), fence), ("machine-b", 2));
        }
        deliver(&b, &ended(&other, "completed", back + 2, 3)).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.tag("boxwright.machine")), ("FINISHED", Some("machine-b")));
        let id = shown.0["info"]["run_id"].as_str().expect("an identity");
        let mut steps: Vec<i64> = world.history(id, "metrics/mAP50B").await.iter().map(|p| p.0).collect();
        steps.sort_unstable();
        assert_eq!(steps, [1, 2, 3]);
    });
}

#[test]
fn machines_that_start_in_one_moment_keep_one_run() {
    with_server(async |world| {
        for _ in 0..6 {
            let run = run("race");
            let sinks: Vec<_> = (0..4).map(|_| world.sink()).collect();
            let deliveries: Vec<_> = (0..4)
                // The later ones begin earlier by their clocks.
                .map(|i| start(&RunRef { machine_id: format!("machine-{i}"), ..run.clone() }, T0 - i, &[]))
                .collect();
            let all = sinks.iter().zip(&deliveries).map(|(sink, delivery)| deliver(sink, delivery));
            futures_util::future::join_all(all).await;
            // Whoever made one too many has thrown it away, and the others have moved on.
            for (number, sink) in sinks.iter().enumerate() {
                deliver(sink, &epoch(&run, 1 + number as i64, T0 + 1000)).await;
            }
            let shown = world.only_run(&run.study_name).await;
            let id = shown.0["info"]["run_id"].as_str().expect("an identity");
            assert_eq!(world.history(id, "metrics/mAP50B").await.len(), 4);
        }
    });
}

#[test]
fn a_run_whose_start_never_arrived_is_made_by_what_does() {
    with_server(async |world| {
        let (sink, run) = (world.sink(), run("headless"));
        deliver_all(&sink, &[epoch(&run, 1, T0 + 1000), ended(&run, "completed", T0 + 2000, 1)], 0).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.tag("task_id")), ("FINISHED", Some(run.task_id.as_str())));
        assert_eq!(shown.0["info"]["start_time"].as_i64(), Some(T0 + 1000));
    });
}

#[test]
fn open_runs_of_a_machine_are_closed_at_its_start() {
    with_server(async |world| {
        let sink = world.sink();
        let machine = format!("machine-{}", uuid::Uuid::new_v4());
        let mine = |study: &str| RunRef { machine_id: machine.clone(), ..run(study) };
        let (dead, live, done, foreign) = (mine("dead"), mine("live"), mine("done"), run("foreign"));
        for run in [&dead, &live, &done, &foreign] {
            deliver(&sink, &start(run, T0, &[])).await;
        }
        deliver(&sink, &ended(&done, "failed", T0 + 5, 1)).await;
        for expected in [1, 0] {
            let closed =
                sink.reconcile(&machine, std::slice::from_ref(&live.instance)).await.expect("it works");
            assert_eq!(closed.len(), expected);
        }
        let mut statuses = Vec::new();
        for run in [&dead, &live, &done, &foreign] {
            statuses.push(world.only_run(&run.study_name).await.status().to_owned());
        }
        assert_eq!(statuses, ["KILLED", "RUNNING", "FAILED", "RUNNING"]);
        let shown = world.only_run(&dead.study_name).await;
        assert!(shown.tag("boxwright.reason").is_some_and(|reason| reason.contains(&machine)));
        // The job comes back all the same: its run goes on.
        deliver(&sink, &start(&dead, T0 + 10, &[])).await;
        let shown = world.only_run(&dead.study_name).await;
        assert_eq!((shown.status(), shown.tag("boxwright.reason")), ("RUNNING", None));
        assert!(sink.reconcile("it's", &[]).await.is_err());
    });
}

#[test]
fn a_run_that_another_service_of_the_same_name_closed_goes_on_with_its_next_epoch() {
    with_server(async |world| {
        let (sink, other) = (world.sink(), world.sink());
        let machine = format!("machine-{}", uuid::Uuid::new_v4());
        let run = RunRef { machine_id: machine.clone(), ..run("namesakes") };
        deliver_all(&sink, &[start(&run, T0, &[]), epoch(&run, 1, T0 + 1000)], 0).await;
        assert_eq!(other.reconcile(&machine, &[]).await.expect("it works").len(), 1);
        assert_eq!(world.only_run(&run.study_name).await.status(), "KILLED");
        deliver(&sink, &epoch(&run, 2, T0 + 2000)).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.tag("boxwright.reason")), ("RUNNING", None));
        // Its own end is final.
        deliver_all(&sink, &[ended(&run, "cancelled", T0 + 3000, 2), epoch(&run, 2, T0 + 2000)], 0).await;
        let shown = world.only_run(&run.study_name).await;
        assert_eq!((shown.status(), shown.tag("boxwright.reason")), ("KILLED", Some("it cancelled")));
    });
}

#[test]
fn an_open_run_that_may_not_be_changed_leaves_the_others_to_be_closed() {
    with_server(async |world| {
        let proxy = Proxy::before(world.server.port);
        let (sink, closing) = (world.sink(), sink_at(&proxy.url));
        let machine = format!("machine-{}", uuid::Uuid::new_v4());
        for _ in 0..2 {
            let run = RunRef { machine_id: machine.clone(), ..run("forbidden") };
            deliver(&sink, &start(&run, T0, &[])).await;
        }
        let mut changes = 0;
        proxy.plan_lines(move |line| {
            changes += usize::from(line.contains("runs/log-batch"));
            if line.contains("runs/log-batch") && changes == 1 { Fault::Answer(403, "") } else { Fault::None }
        });
        assert_eq!(closing.reconcile(&machine, &[]).await.expect("it works").len(), 1);
        assert_eq!(closing.reconcile(&machine, &[]).await.expect("it works").len(), 1, "the other");
    });
}
