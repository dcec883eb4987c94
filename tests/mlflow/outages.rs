//! A server of its own, with a certificate of its own, that is killed, restarted and frozen.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use boxwright::adapters::sink::{AfterFailure, Sink};
use boxwright::adapters::tracking::MlflowSink;
use boxwright::job::delivery::Delivery;
use boxwright::job::service::MlflowConfig;
use serde_json::Value as Json;

use crate::server::{self, MlflowServer};
use crate::world::*;

/// Time for a server to start.
const START_LIMIT: Duration = Duration::from_secs(180);

/// Writes `ca.pem`, `server.pem` and `server.key`; `None` after a loud word where there is no openssl.
fn certificates(folder: &Path) -> Option<()> {
    let run = |line: &str| {
        let done = Command::new("openssl").args(line.split(' ')).current_dir(folder).output();
        done.is_ok_and(|output| output.status.success())
    };
    std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1\n").expect("writable");
    let is_made = run(
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-ca -keyout ca.key -out ca.pem",
    ) && run(
        "req -newkey rsa:2048 -nodes -subj /CN=test-server -keyout server.key -out server.csr",
    ) && run(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
    );
    if !is_made {
        eprintln!("SKIPPED: there is no openssl to make certificates with");
    }
    is_made.then_some(())
}

/// Delivers again and again until it works.
async fn insist(sink: &MlflowSink, delivery: &Delivery) {
    let deadline = Instant::now() + START_LIMIT;
    while let Err(error) = sink.deliver(delivery).await {
        // One that answers and then not holds a lane only.
        assert_ne!(error.verdict(), AfterFailure::GiveUp, "{}", error.chain());
        assert!(Instant::now() < deadline, "{}", error.chain());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_server_with_a_certificate_of_its_own_is_killed_restarted_and_frozen() {
    let Some(program) = server::program() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    if certificates(folder.path()).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let port = server::free_port();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let options = format!("--ssl-keyfile {} --ssl-certfile {}", at("server.key"), at("server.pem"));
        let spawn = || MlflowServer::spawn(&program, folder.path(), port, &["--uvicorn-opts", &options]);
        let mut server = spawn();
        let url = format!("https://127.0.0.1:{port}");
        let trusting = MlflowConfig { ca_file: Some(folder.path().join("ca.pem")), ..config(&url) };
        let sink = MlflowSink::new(&trusting).expect("valid").with_deadline(Duration::from_secs(2));
        let run = run("outages");
        insist(&sink, &start(&run, T0, &[])).await;

        // Whom we do not trust we tell nothing.
        let error = sink_at(&url).deliver(&start(&run, T0, &[])).await.expect_err("an unknown certificate");
        assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
        assert!(error.chain().contains("certificate"), "{}", error.chain());

        for number in 1..=3 {
            insist(&sink, &epoch(&run, number, T0 + number)).await;
        }
        drop(server);
        let error = sink.deliver(&epoch(&run, 4, T0 + 4)).await.expect_err("it is dead");
        assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
        server = spawn();
        insist(&sink, &epoch(&run, 4, T0 + 4)).await;

        server.signal(libc::SIGSTOP);
        for _ in 0..3 {
            let began = Instant::now();
            let error = sink.deliver(&epoch(&run, 5, T0 + 5)).await.expect_err("it is frozen");
            assert_eq!(error.verdict(), AfterFailure::AllWait, "{error:?}");
            assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        }
        server.signal(libc::SIGCONT);
        insist(&sink, &epoch(&run, 5, T0 + 5)).await;
        insist(&sink, &ended(&run, "completed", T0 + 6, 5)).await;

        let receipt = deliver(&sink, &ended(&run, "completed", T0 + 6, 5)).await;
        let pem = std::fs::read(folder.path().join("ca.pem")).expect("readable");
        let root = reqwest::Certificate::from_pem(&pem).expect("a certificate");
        let http = reqwest::Client::builder().add_root_certificate(root).build().expect("a client");
        let query = [("run_id", note(&receipt, "mlflow_run_id")), ("metric_key", "metrics/mAP50B".into())];
        let answer = http.get(format!("{url}/api/2.0/mlflow/metrics/get-history")).query(&query).send().await;
        let answer: Json = answer.expect("an answer").json().await.expect("JSON");
        let points = answer["metrics"].as_array().expect("points");
        let steps: Vec<_> = points.iter().map(|point| point["step"].as_i64().expect("a step")).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5]);
    });
}
