//! Order, places and sentences.

use super::*;
use crate::adapters::gpu::Gpu;
use crate::job::record::NewJob;

use super::super::slots::{Health, Slot};

fn add(journal: &mut Journal, config: &ServiceConfig, id: &str, priority: &str) -> JobRecord {
    let text = format!(
        "model: yolov8n\ntype: yolo\ntask_id: {id}\npriority: {priority}\ntempfile: /nowhere\ntrain: {{data: d}}\n"
    );
    let new = NewJob::sample(&text, &config.spec_context("/w".into()));
    journal.accept(new, None).expect("accepted")
}

fn ids(round: &Round) -> Vec<&str> {
    round.starts.iter().map(|start| start.record.task_id.as_str()).collect()
}

#[test]
fn priority_then_order_and_a_reason_for_everyone() {
    let config = ServiceConfig::default();
    let mut journal = Journal::in_memory().expect("opens");
    for (id, priority) in [("low", "low"), ("m1", "medium"), ("m2", "medium"), ("high", "high")] {
        add(&mut journal, &config, id, priority);
    }
    let now = crate::job::clock::now_unix_ms();
    let mut order = Vec::new();
    for left in (0..4).rev() {
        let round =
            schedule(&mut journal, &config, cpus(1), &none(), &Gate::default(), now).expect("schedules");
        assert_eq!((round.starts.len(), round.waiting), (1, left));
        let id = ids(&round)[0].to_owned();
        for record in
            journal.active().expect("reads").iter().filter(|record| record.state == JobState::Queued)
        {
            assert_eq!(record.reason, format!("waits for a free CPU slot (1 of 1 busy: {id})"));
        }
        let again =
            schedule(&mut journal, &config, cpus(0), &none(), &Gate::default(), now).expect("schedules");
        assert!(again.starts.is_empty());
        journal.change(round.starts[0].record.seq, Change::to(JobState::Completed, "done")).expect("legal");
        order.push(id);
    }
    assert_eq!(order, ["high", "m1", "m2", "low"]);
}

#[test]
fn waiting_makes_important_and_back_off_holds() {
    let config = ServiceConfig { ageing_ms: 1000, ..ServiceConfig::default() };
    let mut journal = Journal::in_memory().expect("opens");
    let low = add(&mut journal, &config, "low", "low");
    // The others come later, as far as ageing counts.
    let now = low.accepted_unix_ms + 2500;
    let config_now = ServiceConfig { ageing_ms: 2000, ..config };
    let high = add(&mut journal, &config_now, "high", "high");
    let round =
        schedule(&mut journal, &config_now, cpus(1), &none(), &Gate::default(), high.accepted_unix_ms)
            .expect("schedules");
    assert_eq!(ids(&round), ["high"]);
    journal.retry(high.seq, crate::job::state::FailureClass::Killed, "later", now + 500).expect("legal");
    let round =
        schedule(&mut journal, &config_now, cpus(2), &none(), &Gate::default(), now).expect("schedules");
    assert_eq!(ids(&round), ["low"]);
    assert_eq!(round.next_due_unix_ms, Some(now + 500));
    let round = schedule(&mut journal, &config_now, cpus(1), &none(), &Gate::default(), now + 500)
        .expect("schedules");
    assert_eq!(ids(&round), ["high"]);
    assert_eq!(round.starts[0].record.attempts, 2);
}

#[test]
fn ten_jobs_on_one_slot_run_in_the_order_they_came() {
    let config = ServiceConfig::default();
    let mut journal = Journal::in_memory().expect("opens");
    for index in 0..10 {
        add(&mut journal, &config, &format!("j{index}"), "medium");
    }
    for index in 0..10 {
        let round = schedule(
            &mut journal,
            &config,
            cpus(1),
            &none(),
            &Gate::default(),
            crate::job::clock::now_unix_ms(),
        )
        .expect("schedules");
        assert_eq!(ids(&round), [format!("j{index}")]);
        journal.change(round.starts[0].record.seq, Change::to(JobState::Completed, "done")).expect("legal");
    }
}

/// Free CPU seats.
fn cpus(count: usize) -> Vec<Seat> {
    (0..count).map(|number| Slot::cpu(number).seat(None)).collect()
}

/// A look that found nothing.
fn none() -> Looked {
    Looked::Found { left_out: Vec::new(), obstacle: Some("no NVIDIA driver".into()) }
}

fn found(left_out: &[(usize, &str)]) -> Looked {
    let left_out = left_out.iter().map(|(number, why)| (*number, (*why).to_owned())).collect();
    Looked::Found { left_out, obstacle: None }
}

fn gpu(number: usize) -> Slot {
    let gpu = Gpu { number, uuid: format!("GPU-{number}"), name: "T".into(), memory_bytes: 1, refused: None };
    let mut slot = Slot::gpu(gpu);
    slot.tested(None, 0);
    slot
}

fn on(journal: &mut Journal, config: &ServiceConfig, id: &str, device: &str) -> JobRecord {
    let text = format!(
        "model: yolov8n\ntype: yolo\ntask_id: {id}\ntempfile: /nowhere\ntrain: {{data: d, device: {device}}}\n"
    );
    let new = NewJob::sample(&text, &config.spec_context("/w".into()));
    journal.accept(new, None).expect("accepted")
}

fn reason(journal: &Journal, id: &str) -> String {
    journal.job(&id.parse().expect("valid")).expect("reads").expect("known").reason
}

#[test]
fn jobs_go_where_they_ask_and_say_what_they_wait_for() {
    let config = ServiceConfig::default();
    let mut journal = Journal::in_memory().expect("opens");
    for (id, device) in [
        ("named", "1"),
        ("also", "cuda:1"),
        ("any1", "null"),
        ("any2", "null"),
        ("slow", "cpu"),
        ("gone", "7"),
    ] {
        on(&mut journal, &config, id, device);
    }
    let now = crate::job::clock::now_unix_ms();
    let seats = vec![Slot::cpu(0).seat(None), gpu(0).seat(None), gpu(1).seat(None)];
    let round =
        schedule(&mut journal, &config, seats, &found(&[]), &Gate::default(), now).expect("schedules");
    let starts: Vec<(usize, &str)> =
        round.starts.iter().map(|start| (start.seat, start.record.task_id.as_str())).collect();
    assert_eq!(starts, [(2, "named"), (1, "any1"), (0, "slow")]);
    assert_eq!(round.starts[0].record.reason, "starts on GPU 1");
    assert_eq!(reason(&journal, "also"), "waits for GPU 1, which trains named");
    assert_eq!(reason(&journal, "any2"), "waits for a free GPU (2 of 2 busy: any1, named)");
    let gone = &round.refused[0];
    assert_eq!((gone.state, gone.class), (JobState::Failed, Some(FailureClass::Config)));
    assert_eq!(gone.reason, "cuda:7 was asked for: this service has GPU 0, GPU 1");
}

#[test]
fn a_job_that_can_never_run_here_fails_with_the_reason() {
    let config = ServiceConfig::default();
    let cases = [
        ("cuda:0", cpus(1), none(), "cuda:0 was asked for: no NVIDIA driver"),
        (
            "cuda:2",
            cpus(1),
            found(&[(2, "`slots.gpus` leaves it out")]),
            "cuda:2 was asked for: `slots.gpus` leaves it out",
        ),
        (
            "cpu",
            vec![gpu(0).seat(None)],
            found(&[]),
            "the CPU was asked for: this service has no CPU slots (`slots.cpu` is 0)",
        ),
    ];
    for (device, seats, looked, sentence) in cases {
        let mut journal = Journal::in_memory().expect("opens");
        on(&mut journal, &config, "a", device);
        let round = schedule(&mut journal, &config, seats, &looked, &Gate::default(), i64::MAX / 2)
            .expect("schedules");
        assert_eq!(round.refused.iter().map(|r| r.reason.as_str()).collect::<Vec<_>>(), [sentence]);
        assert_eq!(round.waiting, 0);
    }
}

#[test]
fn a_job_waits_for_a_look_and_for_a_gpu_that_may_return() {
    let config = ServiceConfig::default();
    let failed = Looked::Failed("the look crashed".into());
    let mut missing = gpu(1);
    missing.vanished("the driver shows GPU 0");
    let mut bad = gpu(0);
    for _ in 0..3 {
        bad.health = Health::Ready;
        bad.fault(1, "launch failed", 0);
    }
    let out = "out of use until 1970-01-01T00:01:00Z: 3 faults in a row, last: launch failed";
    let cases = [
        ("null", cpus(1), Looked::NotYet, "waits for the first look for GPUs".to_owned()),
        ("3", cpus(1), failed.clone(), "waits for GPU 3: the look crashed".to_owned()),
        ("null", cpus(0), failed, "waits for a GPU: the look crashed".to_owned()),
        ("null", cpus(0), none(), "waits for a GPU: no NVIDIA driver".to_owned()),
        (
            "1",
            vec![missing.seat(None)],
            found(&[]),
            "waits for GPU 1, which is missing: the driver shows GPU 0".to_owned(),
        ),
        (
            "null",
            [cpus(1), vec![bad.seat(None)]].concat(),
            found(&[]),
            format!("waits for GPU 0, which is {out}"),
        ),
        (
            "null",
            vec![bad.seat(None), gpu(2).seat(Some(&"x".parse().expect("valid")))],
            found(&[]),
            format!("waits for a free GPU (1 of 2 busy: x; GPU 0 is {out})"),
        ),
    ];
    for (device, seats, looked, sentence) in cases {
        let mut journal = Journal::in_memory().expect("opens");
        on(&mut journal, &config, "a", device);
        let round = schedule(&mut journal, &config, seats, &looked, &Gate::default(), i64::MAX / 2)
            .expect("schedules");
        assert_eq!((round.starts.len(), round.waiting), (0, 1));
        assert_eq!(reason(&journal, "a"), sentence);
    }
    let mut journal = Journal::in_memory().expect("opens");
    on(&mut journal, &config, "a", "null");
    let failed = Looked::Failed("the look crashed".into());
    let round =
        schedule(&mut journal, &config, cpus(1), &failed, &Gate::default(), i64::MAX / 2).expect("schedules");
    assert_eq!(ids(&round), ["a"], "nothing is known of a GPU: the CPU trains");
}

#[test]
fn a_job_goes_on_elsewhere_after_a_fault_of_its_gpu() {
    let config = ServiceConfig::default();
    let mut journal = Journal::in_memory().expect("opens");
    let job = on(&mut journal, &config, "a", "null");
    let (mut first, second) = (gpu(0), gpu(1));
    first.fault(job.seq, "launch failed", 0);
    first.tested(None, 0);
    let seats = || vec![first.seat(None), second.seat(None)];
    let round = schedule(&mut journal, &config, seats(), &found(&[]), &Gate::default(), i64::MAX / 2)
        .expect("schedules");
    assert_eq!(round.starts[0].seat, 1);
    journal.retry(job.seq, FailureClass::Device, "again", 0).expect("legal");
    let only = vec![first.seat(None)];
    let round = schedule(&mut journal, &config, only, &found(&[]), &Gate::default(), i64::MAX / 2)
        .expect("schedules");
    assert_eq!(round.starts[0].seat, 0, "where there is no other, it takes the same");
}

#[test]
fn a_job_that_requires_a_gpu_waits_for_one() {
    let config = ServiceConfig::default();
    let cases = [
        (cpus(1), none(), "waits for a GPU: no NVIDIA driver"),
        (cpus(1), Looked::NotYet, "waits for the first look for GPUs"),
        (cpus(1), Looked::Failed("the look crashed".into()), "waits for a GPU: the look crashed"),
        (
            [cpus(1), vec![gpu(3).seat(Some(&"x".parse().expect("valid")))]].concat(),
            found(&[]),
            "waits for GPU 3, which trains x",
        ),
    ];
    for (seats, looked, sentence) in cases {
        let mut journal = Journal::in_memory().expect("opens");
        on(&mut journal, &config, "a", "cpu}\nrequires_gpu: true\nmetadata: {x: y");
        let round = schedule(&mut journal, &config, seats, &looked, &Gate::default(), i64::MAX / 2)
            .expect("schedules");
        assert_eq!((round.starts.len(), round.waiting), (0, 1));
        assert_eq!(reason(&journal, "a"), sentence);
        let seats = [cpus(1), vec![gpu(3).seat(None)]].concat();
        let round = schedule(&mut journal, &config, seats, &found(&[]), &Gate::default(), i64::MAX / 2)
            .expect("schedules");
        assert_eq!(round.starts.iter().map(|start| start.seat).collect::<Vec<_>>(), [1]);
    }
}
