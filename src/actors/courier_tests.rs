//! Order, outages, lanes, panics and the end of a courier, with a sink that does what the test says.

use std::collections::{HashMap, VecDeque};

use async_trait::async_trait;

use super::*;
use crate::adapters::queue::journal::Journal;
use crate::job::delivery::{DeliveryBody, MetricPoint, NewDelivery, RunMetricsBody, RunRef, SinkName};

/// What the sink does with the next tries of a key; without an order it accepts.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Outage,
    Later,
    Refuse,
    Panic,
}

#[derive(Default)]
struct Scripted {
    made: Mutex<Vec<String>>,
    orders: Mutex<HashMap<String, VecDeque<Order>>>,
    tries: AtomicI64,
}

#[async_trait]
impl Sink for Scripted {
    fn name(&self) -> SinkName {
        SinkName::Mlflow
    }

    async fn begin(&self, _live: &[String]) -> Result<(), DeliveryError> {
        self.obey("begin")
    }

    async fn deliver(&self, delivery: &Delivery) -> Result<Receipt, DeliveryError> {
        self.tries.fetch_add(1, Ordering::SeqCst);
        self.obey(&delivery.key)?;
        self.made.lock().expect("sound").push(delivery.key.clone());
        Ok(Receipt::default())
    }
}

impl Scripted {
    fn obey(&self, key: &str) -> Result<(), DeliveryError> {
        let order = self.orders.lock().expect("sound").get_mut(key).and_then(VecDeque::pop_front);
        let what = "as ordered".to_owned();
        match order {
            Some(Order::Outage) => Err(DeliveryError::Outage { what, source: None }),
            Some(Order::Later) => Err(DeliveryError::Later { what, source: None }),
            Some(Order::Refuse) => Err(DeliveryError::Refused { what, source: None }),
            Some(Order::Panic) => panic!("as ordered"),
            None => Ok(()),
        }
    }
}

fn delivery(lane: &str, key: &str, hold_ms: u64) -> NewDelivery {
    let run = RunRef::sample(lane);
    let point = MetricPoint { key: "k".into(), value: 1.0, at_unix_ms: 1, step: 1 };
    NewDelivery {
        sink: SinkName::Mlflow,
        lane: lane.into(),
        key: key.into(),
        may_be_dropped: true,
        hold_ms,
        body: DeliveryBody::RunMetrics(RunMetricsBody { run, points: vec![point] }),
    }
}

struct Scene {
    keeper: Keeper,
    sink: Arc<Scripted>,
    runtime: tokio::runtime::Runtime,
}

impl Scene {
    fn new(deliveries: Vec<NewDelivery>, orders: &[(&str, &[Order])]) -> Self {
        Self::over(Journal::in_memory().expect("opens"), deliveries, orders)
    }

    fn over(journal: Journal, deliveries: Vec<NewDelivery>, orders: &[(&str, &[Order])]) -> Self {
        for delivery in deliveries {
            journal.put_samples(&delivery.lane.clone(), vec![delivery]).expect("stored");
        }
        let sink = Arc::new(Scripted::default());
        for (key, list) in orders {
            sink.orders.lock().expect("sound").insert((*key).to_owned(), list.iter().copied().collect());
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        Self { keeper: Keeper::start(journal).expect("starts"), sink, runtime }
    }

    fn start(&self) -> Courier {
        let config = OutboxConfig { items_max: 1000, delay_ms: 5, delay_ms_max: 20 };
        self.start_with(config, Arc::default())
    }

    fn start_with(&self, config: OutboxConfig, is_back: Arc<Notify>) -> Courier {
        Courier::start(self.sink.clone(), self.keeper.clone(), config, Arc::new(Notify::new()), is_back)
            .expect("starts")
    }

    fn left(&self) -> u64 {
        let depths = self.runtime.block_on(self.keeper.with(|journal| journal.depths())).expect("reads");
        depths.first().map_or(0, |depth| depth.count)
    }

    fn wait_empty(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.left() > 0 {
            assert!(Instant::now() < deadline, "{} are left", self.left());
            std::thread::yield_now();
        }
    }

    fn made(&self) -> Vec<String> {
        self.sink.made.lock().expect("sound").clone()
    }
}

fn end(courier: &Courier) {
    courier.finish(Duration::from_secs(10));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !courier.is_finished() {
        assert!(Instant::now() < deadline, "the courier does not end");
        std::thread::yield_now();
    }
}

#[test]
fn a_lane_waits_behind_its_failed_delivery_and_others_go_on() {
    let scene = Scene::new(
        vec![delivery("a", "a1", 0), delivery("a", "a2", 0), delivery("b", "b1", 0), delivery("c", "c1", 0)],
        &[("a1", &[Order::Later, Order::Panic, Order::Later]), ("c1", &[Order::Refuse])],
    );
    let courier = scene.start();
    scene.wait_empty();
    assert_eq!(scene.made(), ["b1", "a1", "a2"], "c1 is given up");
    end(&courier);
}

#[test]
fn an_outage_holds_everything_and_loses_nothing() {
    let scene = Scene::new(
        vec![delivery("a", "a1", 0), delivery("b", "b1", 0)],
        &[("a1", &[Order::Outage, Order::Outage, Order::Outage])],
    );
    let courier = scene.start();
    scene.wait_empty();
    assert_eq!(scene.made(), ["a1", "b1"]);
    let services = scene.runtime.block_on(scene.keeper.with(|journal| journal.services())).expect("reads");
    assert_eq!((services[0].0.as_str(), services[0].1["state"].as_str()), ("mlflow", Some("up")));
    end(&courier);
}

#[test]
fn a_service_that_is_not_put_in_order_is_told_all_the_same() {
    for (orders, left) in [
        // An outage is waited for as long as it takes.
        ([Order::Outage; 9].as_slice(), 0),
        ([Order::Later; 2].as_slice(), 0),
        ([Order::Later; 9].as_slice(), 3),
        ([Order::Refuse; 9].as_slice(), 8),
    ] {
        let scene = Scene::new(vec![delivery("a", "a1", 0)], &[("begin", orders)]);
        let courier = scene.start();
        scene.wait_empty();
        assert_eq!(scene.made(), ["a1"]);
        assert_eq!(scene.sink.orders.lock().expect("sound")["begin"].len(), left);
        end(&courier);
    }
}

#[test]
fn at_the_end_held_deliveries_are_made_and_an_outage_is_not_waited_for() {
    let scene = Scene::new(vec![delivery("a", "held", 3_600_000)], &[]);
    let courier = scene.start();
    end(&courier);
    assert_eq!((scene.made(), scene.left()), (vec!["held".to_owned()], 0));
    let forever = [Order::Outage; 1000];
    let scene = Scene::new(vec![delivery("a", "a1", 0)], &[("a1", &forever)]);
    let courier = scene.start();
    end(&courier);
    assert_eq!((scene.made(), scene.left()), (Vec::new(), 1), "the next start delivers it");
    assert!(scene.sink.tries.load(Ordering::SeqCst) < 100, "no hot loop");
}

#[test]
fn what_follows_a_failure_in_its_lane_waits_also_within_a_batch() {
    let mut deliveries: Vec<NewDelivery> = (0..10).map(|n| delivery("a", &format!("a{n}"), 0)).collect();
    deliveries.extend((0..10).map(|n| delivery("b", &format!("b{n}"), 0)));
    let scene = Scene::new(deliveries, &[("a3", &[Order::Later]), ("b5", &[Order::Refuse])]);
    let courier = scene.start();
    scene.wait_empty();
    let made = scene.made();
    let of = |lane: &str| made.iter().filter(|key| key.starts_with(lane)).cloned().collect::<Vec<_>>();
    let keys = |lane: &str, left_out: Option<u32>| {
        (0..10).filter(|n| Some(*n) != left_out).map(|n| format!("{lane}{n}")).collect::<Vec<_>>()
    };
    assert_eq!((of("a"), of("b")), (keys("a", None), keys("b", Some(5))));
    let place = |key: &str| made.iter().position(|known| known == key);
    assert!(place("b9") < place("a3"), "the other lane did not wait: {made:?}");
    end(&courier);
}

/// A journal on the disk, and a hand that makes it refuse.
fn refusing(trigger: &str) -> (tempfile::TempDir, Journal, rusqlite::Connection) {
    let folder = tempfile::tempdir().expect("a folder");
    let journal = Journal::open(folder.path()).expect("opens");
    let hand = rusqlite::Connection::open(Journal::path(folder.path())).expect("opens");
    hand.execute_batch(&format!(
        "CREATE TRIGGER refuse BEFORE {trigger} ON outbox BEGIN SELECT RAISE(ABORT, 'no room'); END"
    ))
    .expect("made");
    (folder, journal, hand)
}

/// Long enough for thousands of rounds without a pause.
const A_WHILE: Duration = Duration::from_millis(400);

#[test]
fn a_journal_that_keeps_what_was_made_is_asked_again_and_nothing_is_made_twice() {
    let (_folder, journal, hand) = refusing("DELETE");
    let scene = Scene::over(journal, vec![delivery("a", "a1", 0), delivery("b", "b1", 0)], &[]);
    let courier = scene.start();
    let deadline = Instant::now() + A_WHILE;
    while Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!((scene.made().len(), scene.left()), (2, 2));
    hand.execute_batch("DROP TRIGGER refuse").expect("dropped");
    scene.wait_empty();
    assert_eq!(scene.made(), ["a1", "b1"], "made once each");
    end(&courier);
}

#[test]
fn a_journal_that_takes_no_postponement_is_no_hot_loop() {
    let (_folder, journal, hand) = refusing("UPDATE");
    let scene = Scene::over(journal, vec![delivery("a", "a1", 0)], &[("a1", &[Order::Later; 100_000])]);
    let courier = scene.start();
    let deadline = Instant::now() + A_WHILE;
    while Instant::now() < deadline {
        std::thread::yield_now();
    }
    let tries = scene.sink.tries.load(Ordering::SeqCst);
    // Delays of 5, 10, and then 20 ms and more.
    assert!((1..=30).contains(&tries), "{tries} tries");
    hand.execute_batch("DROP TRIGGER refuse").expect("dropped");
    scene.sink.orders.lock().expect("sound").clear();
    scene.wait_empty();
    end(&courier);
}

#[test]
fn a_service_that_is_heard_again_ends_the_back_off() {
    let scene = Scene::new(vec![delivery("a", "a1", 0)], &[("a1", &[Order::Outage])]);
    let hour = OutboxConfig { items_max: 1000, delay_ms: 3_600_000, delay_ms_max: 3_600_000 };
    let is_back = Arc::new(Notify::new());
    let courier = scene.start_with(hour, is_back.clone());
    let deadline = Instant::now() + Duration::from_secs(30);
    while scene.sink.tries.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "no try");
        std::thread::yield_now();
    }
    is_back.notify_one();
    scene.wait_empty();
    assert_eq!(scene.sink.tries.load(Ordering::SeqCst), 2);
    end(&courier);
}

#[test]
fn the_same_key_replaces_what_waits_and_keeps_the_sooner_time() {
    let journal = Journal::in_memory().expect("opens");
    for (key, hold_ms) in [("x", 1000), ("y", 0), ("x", 90_000)] {
        journal.put_samples("a", vec![delivery("a", key, hold_ms)]).expect("stored");
    }
    let now = now_unix_ms();
    let sink = SinkName::Mlflow;
    assert_eq!(journal.depths().expect("reads")[0].count, 2);
    assert_eq!(journal.due(sink, now, 9).expect("reads")[0].key, "y", "x went to the end of its lane");
    let y = journal.due(sink, now, 9).expect("reads")[0].id;
    journal.delivered(&[y]).expect("removes");
    assert!(journal.due(sink, now, 9).expect("reads").is_empty(), "x is held");
    assert_eq!(
        journal.due(sink, now + 2000, 9).expect("reads")[0].key,
        "x",
        "but not for longer than at first"
    );
}
