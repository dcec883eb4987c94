//! A server of the S3 protocol that knows no conditional writes: it refuses them, or takes no notice of them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use boxwright::adapters::store::Expected;
use boxwright::job::secret::Secret;
use boxwright::job::service::StoreConfig;

use super::{bucket, key, open};

/// What it does with a write on a condition.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    /// It stores.
    Ignores,
    /// 501 with a reason.
    Refuses,
    /// 501 without a word.
    RefusesSilently,
}

#[derive(Default)]
struct Objects {
    /// Content and checksum by path.
    stored: HashMap<String, (Vec<u8>, String)>,
    /// Requests with a condition.
    conditions: usize,
}

/// Serves objects whose names need no encoding, for as long as the test lasts.
fn serve(manner: Manner) -> (StoreConfig, Arc<Mutex<Objects>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let objects: Arc<Mutex<Objects>> = Arc::default();
    let shared = objects.clone();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let shared = shared.clone();
            thread::spawn(move || answer(client, manner, &shared));
        }
    });
    let config = StoreConfig {
        endpoint: Some(endpoint),
        id: Some(Secret::new("an-id")),
        secret: Some(Secret::new("a-secret")),
        folder: None,
        ..StoreConfig::default()
    };
    (config, objects)
}

fn answer(mut client: TcpStream, manner: Manner, shared: &Mutex<Objects>) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") {
        if client.read(&mut byte)? == 0 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let header = |name: &str| {
        let line = head.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
        Some(line[name.len() + 1..].trim().to_owned())
    };
    let length = header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    client.read_exact(&mut body)?;
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default().trim_end_matches('/').to_owned();
    let is_conditional = header("if-match").or_else(|| header("if-none-match")).is_some();
    let mut objects = shared.lock().expect("no poison");
    let (status, headers, content) = match (method, objects.stored.get(&path).cloned()) {
        ("PUT", _) if is_conditional && manner != Manner::Ignores => {
            objects.conditions += 1;
            let xml =
                "<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>";
            let xml = if manner == Manner::Refuses { xml } else { "" };
            ("501 Not Implemented", "Content-Type: application/xml\r\n".to_owned(), xml.as_bytes().to_vec())
        }
        ("PUT", _) => {
            objects.conditions += usize::from(is_conditional);
            let sum = header("x-amz-meta-sha256").unwrap_or_default();
            objects.stored.insert(path, (body, sum));
            ("200 OK", "ETag: \"new\"\r\n".to_owned(), Vec::new())
        }
        ("HEAD" | "GET", Some((content, sum))) => {
            let etag = &sum[..sum.len().min(32)];
            let date = "Last-Modified: Tue, 01 Jul 2025 00:00:00 GMT";
            let headers = format!("ETag: \"{etag}\"\r\nx-amz-meta-sha256: {sum}\r\n{date}\r\n");
            ("200 OK", headers, content)
        }
        _ => ("404 Not Found", String::new(), Vec::new()),
    };
    drop(objects);
    let length = content.len();
    let answer =
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    client.write_all(answer.as_bytes())?;
    if method != "HEAD" {
        client.write_all(&content)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_server_without_conditions_stores_without_them() {
    for manner in [Manner::Ignores, Manner::Refuses, Manner::RefusesSilently] {
        let (config, objects) = serve(manner);
        let store = open(&config);
        let (models, at) = (bucket("models"), key("manifest.json"));
        let put = async |text: &str, expected: Expected<'_>| {
            let stored = store.put_if(&models, &at, text.as_bytes().to_vec(), expected).await;
            assert!(stored.unwrap_or_else(|error| panic!("{manner:?}: {error:?}")).is_some(), "{manner:?}");
            assert_eq!(store.get_bytes(&models, &at, 99).await.expect("read"), text.as_bytes());
        };
        put("one", Expected::Nothing).await;
        for text in ["two", "three", "four"] {
            let seen = store.get_versioned(&models, &at, 99).await.expect("read");
            put(text, Expected::Version(&seen.version.expect("a version"))).await;
        }
        // It is asked until it has answered to a version that never was, and not again.
        assert_eq!(objects.lock().expect("no poison").conditions, 2, "{manner:?}");
        put("five", Expected::Nothing).await;
        assert_eq!(objects.lock().expect("no poison").conditions, 2, "{manner:?}");
    }
}
