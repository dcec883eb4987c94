//! `boxwright status --services`: how the side services do, and what waits for them.

use serde_json::{Value as Json, json};

use super::CliError;
use super::console::shorten;
use crate::adapters::queue::journal::Journal;
use crate::job::clock::{human_ms, now_unix_ms};
use crate::job::delivery::SinkName;
use crate::job::service::ServiceConfig;

/// A side service and what waits for it.
struct Line {
    name: &'static str,
    address: Option<String>,
    state: Json,
    count: u64,
    oldest_unix_ms: Option<i64>,
}

/// Shows the side services.
///
/// # Errors
/// When the journal cannot be read.
pub fn show(journal: Option<&Journal>, config: &ServiceConfig, as_json: bool) -> Result<(), CliError> {
    let lines =
        lines(journal, config).map_err(|error| CliError::failed_from("the journal cannot be read", error))?;
    if as_json {
        let json: Json = lines.iter().map(line_json).collect();
        println!("{json}");
        return Ok(());
    }
    println!("{:<7}  {:<5}  {:>8}  {:<12}  {:<32}  what", "service", "state", "waiting", "oldest", "where");
    for line in &lines {
        let age = line.oldest_unix_ms.map_or("-".to_owned(), |at| human_ms((now_unix_ms() - at).max(0)));
        let address = line.address.as_deref().unwrap_or("not configured");
        println!(
            "{:<7}  {:<5}  {:>8}  {:<12}  {:<32}  {}",
            line.name,
            word(line),
            line.count,
            age,
            shorten(address, 32),
            shorten(&why(line), 100)
        );
    }
    Ok(())
}

fn lines(
    journal: Option<&Journal>,
    config: &ServiceConfig,
) -> Result<Vec<Line>, crate::adapters::queue::QueueError> {
    let depths = journal.map(Journal::depths).transpose()?.unwrap_or_default();
    let states = journal.map(Journal::services).transpose()?.unwrap_or_default();
    let state =
        |name: &str| states.iter().find(|(known, _)| known == name).map_or(Json::Null, |(_, s)| s.clone());
    let masked =
        |text: &str| crate::job::spec::masked(&Json::from(text)).as_str().unwrap_or_default().to_owned();
    let redis = config.redis.is_on().then(|| masked(&config.redis.urls.join(",")));
    let store = config.store.endpoint.as_deref().map(masked);
    let store = store.or_else(|| config.store.folder.as_ref().map(|folder| folder.display().to_string()));
    let mlflow = config.mlflow.tracking_uri.as_deref().map(masked);
    let line = |name: &'static str, sink: Option<SinkName>, address: Option<String>| {
        let depth = depths.iter().find(|depth| Some(depth.sink) == sink);
        Line {
            name,
            address,
            state: state(name),
            count: depth.map_or(0, |depth| depth.count),
            oldest_unix_ms: depth.map(|depth| depth.oldest_unix_ms),
        }
    };
    Ok(vec![
        line("queue", None, redis.clone()),
        line("redis", Some(SinkName::Redis), redis),
        line("store", Some(SinkName::Store), store),
        line("mlflow", Some(SinkName::Mlflow), mlflow),
    ])
}

fn word(line: &Line) -> &str {
    match line.address {
        None => "off",
        Some(_) => line.state["state"].as_str().unwrap_or("-"),
    }
}

fn why(line: &Line) -> String {
    let text = |name: &str| line.state[name].as_str().map(str::to_owned);
    match (text("error"), text("since"), text("last_success")) {
        (Some(error), Some(since), _) => format!("since {since}: {error}"),
        (Some(error), None, _) => error,
        (None, _, Some(at)) => format!("last success {at}"),
        (None, _, None) => "nothing was sent yet".to_owned(),
    }
}

fn line_json(line: &Line) -> Json {
    json!({
        "service": line.name,
        "address": line.address,
        "state": word(line),
        "waiting": line.count,
        "oldest_age_ms": line.oldest_unix_ms.map(|at| (now_unix_ms() - at).max(0)),
        "detail": line.state,
    })
}
