//! The documented clients, word for word, against a running service.

use std::process::Command;

use boxwright::job::state::JobState;
use redis::Commands;

use crate::park::{Park, job_file, stub_job};

#[test]
fn a_push_to_the_stream_becomes_a_job_with_progress_log_and_one_result() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    let path = job_file(&world.path(""), "job.yaml", &stub_job("pushed", "steps=40,pause=0.02"));
    world.start();
    // XADD training_queue * config_path <path> trial_number <n>
    park.push(&[("config_path", &path), ("trial_number", "3")]);
    world.wait_state("pushed", JobState::Running);
    let shown = world.wait("progress", || {
        let shown = park.hash("progress:pushed");
        (shown.get("EPOCH").is_some_and(|epoch| epoch != "0")).then_some(shown)
    });
    assert!(shown.len() >= 20, "{shown:?}");
    for (name, value) in [("TRIAL_NUMBER", "3"), ("status", "running"), ("MACHINE_ID", "box-1")] {
        assert_eq!(shown.get(name).map(String::as_str), Some(value), "{name}");
    }
    let ttl: i64 = park.client().ttl("progress:pushed").expect("reads");
    assert_eq!(ttl, -1, "no lifetime while it runs");
    let pending: redis::streams::StreamPendingReply =
        park.client().xpending("training_queue", "training_group").expect("reads");
    assert_eq!(pending.count(), 1, "pending until the result is durable");
    let result = park.wait_result(&world, "pushed");
    assert_eq!((result["status"].as_str(), result["fitness"].as_f64()), (Some("completed"), Some(0.5)));
    assert_eq!((result["trial_number"].as_i64(), result["machine_id"].as_str()), (Some(3), Some("box-1")));
    assert_eq!(result["best_checkpoint"]["sha256"].as_str().map(str::len), Some(64));
    world.wait("the end of the queue", || (park.queue_length() == 0).then_some(()));
    world.wait("lifetimes", || {
        let of = |key: &str| park.client().ttl::<_, i64>(key).unwrap_or(-2);
        ((1..=1800).contains(&of("progress:pushed")) && (1..=3600).contains(&of("stream:pushed")))
            .then_some(())
    });
    let lines = world.wait("the stream to be the log", || {
        let log: redis::streams::StreamRangeReply = park.client().xrange_all("stream:pushed").ok()?;
        let lines: String = log.ids.iter().filter_map(|entry| entry.get::<String>("value")).collect();
        (lines == world.read("logs/jobs/pushed.log")).then_some(lines)
    });
    assert!(lines.contains("is accepted") && lines.contains("epoch 1/40"), "{lines}");
    let epochs: i64 = park.client().zcard("metrics:pushed").expect("reads");
    assert_eq!(epochs, 40);
    world.end_service(libc::SIGTERM);
}

#[test]
fn lists_are_taken_first_in_first_out_also_doubly_encoded() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    let mut client = park.client();
    for number in 0..5 {
        let text = stub_job(&format!("file-{number}"), "steps=2,pause=0.01");
        let path = job_file(&world.path(""), &format!("{number}.yaml"), &text);
        let payload =
            serde_json::json!({"task_id": format!("list-{number}"), "config_path": path, "user_code": "u"});
        let mut payload = payload.to_string();
        if number % 2 == 1 {
            payload = serde_json::Value::from(payload).to_string();
        }
        let _: i64 = client.rpush("training_queue", payload).expect("pushed");
    }
    world.start();
    let mut order = Vec::new();
    for number in 0..5 {
        let result = park.wait_result(&world, &format!("list-{number}"));
        assert_eq!(result["status"], "completed", "{result} {}", world.logs());
        order.push(result["started_at"].as_str().expect("a time").to_owned());
    }
    assert!(order.is_sorted(), "{order:?}");
    world.wait("an empty list of work in hand", || {
        let left: i64 = park.client().llen("training_queue:processing:box-1").expect("reads");
        (left == 0).then_some(())
    });
    world.end_service(libc::SIGTERM);
}

#[test]
fn stop_files_and_keys_cancel() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    for (task_id, by_key) in [("by-file", false), ("by-key", true)] {
        let text = stub_job(task_id, "steps=100000");
        park.push(&[("config", &text)]);
        world.wait_state(task_id, JobState::Running);
        if by_key {
            let _: () = park.client().set_ex(format!("study:{task_id}:cancel"), "1", 3600).expect("set");
        } else {
            world.write(&format!("configs/stop/stop_training_{task_id}.txt"), "");
        }
        let result = park.wait_result(&world, task_id);
        assert_eq!((result["status"].as_str(), result["error"].is_null()), (Some("cancelled"), true));
    }
    world.end_service(libc::SIGTERM);
}

#[test]
fn what_can_never_run_goes_to_the_dead_with_its_reason_and_what_waits_is_taken_by_priority() {
    let Some(park) = Park::new() else { return };
    let mut world = park.machine("box-1");
    world.start();
    park.push(&[("trial_number", "1")]);
    park.push(&[("config", "model: yolov8n\ntype: yolo\ntrian: {}\n")]);
    park.push(&[("config", &stub_job("x; touch p", "steps=1"))]);
    let dead = world.wait("three dead", || {
        let dead: redis::streams::StreamRangeReply = park.client().xrange_all("training_queue:dead").ok()?;
        (dead.ids.len() == 3).then_some(dead)
    });
    let reasons: Vec<String> = dead.ids.iter().filter_map(|entry| entry.get("reason")).collect();
    assert!(reasons[0].contains("config_path") && reasons[1].contains("did you mean `train`"), "{reasons:?}");
    assert!(reasons[2].contains("task_id"), "{reasons:?}");
    park.push(&[("config", &stub_job("holds", "steps=30,pause=0.05"))]);
    world.wait_state("holds", JobState::Running);
    for (id, priority) in [("low", "low"), ("first", "medium"), ("second", "medium"), ("urgent", "high")] {
        park.push(&[("config", &stub_job(id, "steps=1,pause=0.01")), ("priority", priority)]);
    }
    let ids = ["urgent", "first", "second", "low"];
    let started: Vec<String> = ids
        .iter()
        .map(|id| park.wait_result(&world, id)["started_at"].as_str().expect("a time").to_owned())
        .collect();
    assert!(started.is_sorted(), "{ids:?} {started:?}");
    assert_eq!(park.queue_length(), 0);
    world.end_service(libc::SIGTERM);
}

#[test]
fn the_command_line_client_sees_what_it_is_promised() {
    let Some(park) = Park::new() else { return };
    let Some(cli) = crate::servers::find("BOXWRIGHT_REDIS_CLI", &["redis-cli"]) else { return };
    let mut world = park.machine("box-1");
    let path = job_file(&world.path(""), "job.yaml", &stub_job("cli", "steps=3"));
    world.start();
    let run = |arguments: &[&str]| {
        let port = park.redis.port().to_string();
        let output = Command::new(&cli).args(["-p", &port]).args(arguments).output().expect("runs");
        String::from_utf8(output.stdout).expect("text")
    };
    run(&["XADD", "training_queue", "*", "config_path", &path, "trial_number", "1"]);
    park.wait_result(&world, "cli");
    let shown = world.wait("the end in the hash", || {
        let shown = run(&["HGETALL", "progress:cli"]);
        // A name and a value for each of at least 20 fields.
        (shown.contains("completed") && shown.lines().count() >= 40).then_some(shown)
    });
    assert!(shown.contains("TOTAL_EPOCHS"), "{shown}");
    world.end_service(libc::SIGTERM);
}
