//! What networks and servers do: nothing is lost, nothing is there twice.

use std::time::{Duration, Instant};

use boxwright::adapters::sink::{AfterFailure, DeliveryError, Sink};
use boxwright::adapters::tracking::MlflowSink;
use boxwright::job::delivery::{Delivery, RunRef};
use boxwright::job::secret::Secret;
use boxwright::job::service::MlflowConfig;

use crate::proxy::{Fault, Proxy};
use crate::world::*;

const SHORT: Duration = Duration::from_millis(600);

fn whole_life(run: &RunRef, epochs: i64) -> Vec<Delivery> {
    let mut all = vec![start(run, T0, &[("batch", "16")])];
    all.extend((1..=epochs).map(|e| epoch(run, e, T0 + 1000 * e)));
    all.push(ended(run, "completed", T0 + 1000 * (epochs + 1), epochs));
    all
}

async fn assert_whole(world: &World, run: &RunRef, epochs: i64) {
    assert_eq!(versions_of_whole(world, run, epochs).await, 1);
}

/// Checks a whole life and counts its versions in the registry.
async fn versions_of_whole(world: &World, run: &RunRef, epochs: i64) -> usize {
    let shown = world.only_run(&run.study_name).await;
    assert_eq!((shown.status(), shown.param("batch")), ("FINISHED", Some("16")));
    let id = shown.0["info"]["run_id"].as_str().expect("an identity");
    let expected: Vec<_> = (1..=epochs).map(|e| (e, T0 + 1000 * e, e as f64 / 100.0)).collect();
    assert_eq!(world.history(id, "metrics/mAP50B").await, expected);
    assert_eq!(world.history(id, "train/box_loss").await.len(), expected.len());
    assert_eq!(world.history(id, "fitness").await.len(), 1);
    let filter = format!("name = '{}'", run.study_name);
    let answer = world.get("model-versions/search", &[("filter", &filter)]).await;
    answer["model_versions"].as_array().map_or(0, Vec::len)
}

/// A number that depends on both in no simple way.
fn random(number: usize, seed: u64) -> u64 {
    let mut x =
        (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

async fn failure(sink: &MlflowSink, delivery: &Delivery) -> DeliveryError {
    sink.deliver(delivery).await.expect_err("it cannot succeed")
}

#[test]
fn a_black_hole_is_an_outage_within_the_deadline() {
    with_server(async |world| {
        let (proxy, run) = (Proxy::before(world.server.port), run("hole"));
        let sink = sink_at(&proxy.url).with_deadline(SHORT);
        proxy.set(Fault::BlackHole);
        let all = whole_life(&run, 3);
        for delivery in &all {
            let began = Instant::now();
            let error = failure(&sink, delivery).await;
            assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
            let took = began.elapsed();
            assert!(took >= SHORT && took < SHORT + Duration::from_secs(5), "{took:?}");
        }
        proxy.set(Fault::None);
        deliver_all(&sink.with_deadline(PATIENT), &all, 0).await;
        assert_whole(&world, &run, 3).await;
    });
}

#[test]
fn a_server_that_flaps_gets_everything_once() {
    with_server(async |world| {
        for seed in 0..4 {
            let (proxy, run) = (Proxy::before(world.server.port), run("flap"));
            let sink = sink_at(&proxy.url);
            // One request in two fails; a third of those that fail were carried out all the same.
            proxy.plan(move |number| match random(number, seed) % 12 {
                0 | 1 => Fault::Cut,
                2 | 3 => Fault::Lost,
                4 => Fault::Answer(500, ""),
                5 => Fault::Answer(502, "content-type: text/html\r\n"),
                _ => Fault::None,
            });
            let failures = deliver_all(&sink, &whole_life(&run, 12), 500).await;
            assert!(failures > 5, "{failures}");
            assert_whole(&world, &run, 12).await;
        }
    });
}

#[test]
fn an_answer_that_is_lost_at_any_place_does_no_harm() {
    with_server(async |world| {
        // As many requests as a whole life takes; one answer is lost in each round.
        let count = {
            let (proxy, run) = (Proxy::before(world.server.port), run("count"));
            deliver_all(&sink_at(&proxy.url), &whole_life(&run, 2), 0).await;
            proxy.seen().len()
        };
        for lost in 0..count {
            let (proxy, run) = (Proxy::before(world.server.port), run("lost"));
            proxy.plan(move |number| if number == lost { Fault::Lost } else { Fault::None });
            let failures = deliver_all(&sink_at(&proxy.url), &whole_life(&run, 2), 3).await;
            assert_eq!(failures, 1, "answer {lost} of {count}");
            assert_whole(&world, &run, 2).await;
        }
    });
}

/// A whole life in which request number `late` is carried out after it was given up. How many versions the
/// registry has too many; `None` when there was no such request.
async fn one_late_request(world: &World, late: usize) -> Option<usize> {
    let (proxy, run) = (Proxy::before(world.server.port), run("late"));
    proxy.plan(move |number| if number == late { Fault::Late } else { Fault::None });
    let sink = sink_at(&proxy.url).with_deadline(Duration::from_millis(1500));
    let all = whole_life(&run, 2);
    let (last, first) = all.split_last().expect("a whole life");
    deliver_all(&sink, first, 50).await;
    // A run trains for longer than a request is late.
    world.until("late requests are carried out", || proxy.late() == 0).await;
    deliver_all(&sink, std::slice::from_ref(last), 50).await;
    world.until("late requests are carried out", || proxy.late() == 0).await;
    let versions = versions_of_whole(world, &run, 2).await;
    (proxy.seen().len() > late).then_some(versions - 1)
}

#[test]
fn a_request_that_is_carried_out_after_it_was_given_up_does_no_harm() {
    with_server(async |world| {
        let (mut twice, mut first) = (0, 0);
        loop {
            // Some at a time, since each waits most of its time.
            let some = (first..first + 6).map(|late| one_late_request(&world, late));
            let done = futures_util::future::join_all(some).await;
            twice += done.iter().flatten().sum::<usize>();
            first += 6;
            if done.contains(&None) {
                break;
            }
            assert!(first < 100, "a life of {first} requests");
        }
        // A version is made by one request; the registry may keep a twin of it, and the alias stands on the first.
        assert!(twice <= 1, "{twice} versions too many");
    });
}

#[test]
fn answers_are_taken_for_what_they_mean() {
    with_server(async |world| {
        let (proxy, run) = (Proxy::before(world.server.port), run("answers"));
        let sink = sink_at(&proxy.url);
        let delivery = start(&run, T0, &[]);
        for (fault, word) in [
            (Fault::Cut, "no answer"),
            (Fault::Answer(500, ""), "does not work"),
            (Fault::Answer(503, ""), "does not work"),
            (Fault::Answer(401, ""), "credentials"),
            (Fault::Answer(403, ""), "credentials"),
            (Fault::Answer(302, "location: http://elsewhere/\r\n"), "http://elsewhere/"),
            (Fault::Answer(404, ""), "not an answer of a tracking server"),
            (Fault::Answer(200, ""), "its answer has no"),
        ] {
            proxy.set(fault);
            let error = failure(&sink, &delivery).await;
            assert_eq!(error.verdict(), AfterFailure::AllWait, "{fault:?}: {error:?}");
            assert!(error.to_string().contains(word), "{fault:?}: {error}");
        }
        // Nobody is there.
        let error = failure(&sink_at("http://127.0.0.1:9"), &delivery).await;
        assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
        // A delivery at which a server fails that does other things holds its own lane only.
        for fault in [Fault::Answer(500, ""), Fault::Answer(403, ""), Fault::Answer(404, "")] {
            let study = run.study_name.clone();
            proxy.plan_lines(move |line| if line.contains(&study) { fault } else { Fault::None });
            let error = failure(&sink, &delivery).await;
            assert_eq!(error.verdict(), AfterFailure::LaneWaits, "{fault:?}: {error:?}");
        }
        // So does one that it begins with and does not end.
        proxy.plan(|number| if number == 0 { Fault::None } else { Fault::Cut });
        let error = failure(&sink, &delivery).await;
        assert_eq!(error.verdict(), AfterFailure::LaneWaits, "{error:?}");
        // A name that the server does not take is given up.
        proxy.set(Fault::None);
        let long = RunRef { study_name: "x".repeat(600), ..run };
        let error = failure(&sink, &start(&long, T0, &[])).await;
        assert_eq!(error.verdict(), AfterFailure::GiveUp, "{error:?}");
        assert!(error.to_string().contains("maximum length"), "{error}");
    });
}

#[test]
fn a_server_that_asks_for_patience_is_left_alone() {
    with_server(async |world| {
        let (proxy, run) = (Proxy::before(world.server.port), run("busy"));
        let sink = sink_at(&proxy.url);
        proxy.plan(|number| match number {
            0 => Fault::Answer(429, "retry-after: 2\r\n"),
            _ => Fault::None,
        });
        let began = Instant::now();
        let delivery = start(&run, T0, &[]);
        let mut tries = 0;
        while let Err(error) = sink.deliver(&delivery).await {
            assert!(error.to_string().contains("asks to wait"), "{error}");
            tries += 1;
            assert!(began.elapsed() < Duration::from_secs(30), "it waits too long");
            tokio::time::sleep(Duration::from_millis(20)).await;
            let asked = proxy.seen().len();
            assert!(asked == 1 || began.elapsed() >= Duration::from_secs(2), "{asked} requests");
        }
        assert!(tries > 3 && began.elapsed() >= Duration::from_secs(2), "{tries}");
    });
}

#[test]
fn credentials_are_sent_and_never_said() {
    with_server(async |world| {
        let (proxy, run) = (Proxy::before(world.server.port), run("login"));
        let word = || Some(Secret::new("hunter2"));
        let plain = config(&proxy.url);
        let with_name = proxy.url.replace("http://", "http://me:hunter2@");
        // base64 of me:hunter2.
        let basic = "Basic bWU6aHVudGVyMg==";
        let cases = [
            (MlflowConfig { username: Some("me".into()), password: word(), ..plain.clone() }, basic),
            (MlflowConfig { token: word(), ..plain.clone() }, "Bearer hunter2"),
            (config(&with_name), basic),
            (plain, ""),
        ];
        for (config, expected) in cases {
            let sink = MlflowSink::new(&config).expect("valid").with_deadline(PATIENT);
            proxy.set(Fault::Answer(401, ""));
            let error = failure(&sink, &start(&run, T0, &[])).await;
            let text = format!("{error:?} {}", error.chain());
            assert!(!text.contains("hunter2") && text.contains("credentials"), "{text}");
            proxy.set(Fault::None);
            let receipt = deliver(&sink, &start(&run, T0, &[])).await;
            assert!(!format!("{receipt:?}").contains("hunter2"), "{receipt:?}");
            let seen = proxy.seen().pop().expect("a request");
            assert_eq!(seen.authorization, expected, "{}", seen.line);
        }
    });
}
