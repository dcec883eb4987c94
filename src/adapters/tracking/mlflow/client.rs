//! Requests to the server: deadlines, credentials, and what its answers mean.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode, Url, redirect};
use serde_json::Value as Json;

use crate::adapters::tracking::TrackingError;
use crate::job::secret::Secret;
use crate::job::service::MlflowConfig;

/// Time for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Time for a request from beginning to end, unless told otherwise.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);
/// Time that an idle connection is kept. The server's own limit is 5 s; a request on a connection that it closes just then fails.
const IDLE_LIMIT: Duration = Duration::from_secs(3);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Characters of an error's text that are passed on.
const SAID_CHARS_MAX: usize = 300;
/// Bytes of a file with certificates.
const CA_BYTES_MAX: u64 = 4 << 20;
/// Longest patience that the server can ask for.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// Patience when it names none.
const WAIT_DEFAULT: Duration = Duration::from_secs(5);

enum Login {
    Nobody,
    Basic(String, Secret),
    Token(Secret),
}

/// A client of one server.
pub(super) struct Client {
    http: reqwest::Client,
    /// Address without a slash at its end and without credentials.
    base: String,
    login: Login,
    deadline: Duration,
    /// Nothing is asked before.
    not_before: Mutex<Option<Instant>>,
    /// Answers so far that only a tracking server that works gives.
    answers: AtomicU64,
}

fn config_error(what: String, source: Option<Box<dyn std::error::Error + Send + Sync>>) -> TrackingError {
    TrackingError::Config { what, source }
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, TrackingError> {
    let unreadable = |source: Box<dyn std::error::Error + Send + Sync>| {
        config_error(format!("the certificates in {} cannot be read", path.display()), Some(source))
    };
    let bytes = std::fs::metadata(path).map_err(|error| unreadable(error.into()))?.len();
    if bytes > CA_BYTES_MAX {
        return Err(config_error(format!("{} is too long for certificates", path.display()), None));
    }
    let text = std::fs::read(path).map_err(|error| unreadable(error.into()))?;
    let found = Certificate::from_pem_bundle(&text).map_err(|error| unreadable(error.into()))?;
    if found.is_empty() {
        return Err(config_error(format!("{} holds no certificate", path.display()), None));
    }
    Ok(found)
}

/// The base address and the credentials of it, which may stand in the address itself.
fn address(config: &MlflowConfig) -> Result<(String, Login), TrackingError> {
    let uri = config.tracking_uri.as_deref().unwrap_or_default();
    // What cannot be parsed is not shown: a password may stand in it.
    let bad = |why: &str| config_error(format!("its address {why}"), None);
    let mut url = Url::parse(uri.trim()).map_err(|_| bad("is no URL (http://HOST:PORT or https://)"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(bad("is not http://HOST:PORT or https://"));
    }
    let mut login = match (&config.token, &config.username) {
        (Some(token), _) => Login::Token(token.clone()),
        (None, Some(name)) => {
            Login::Basic(name.clone(), config.password.clone().unwrap_or_else(|| Secret::new("")))
        }
        (None, None) => Login::Nobody,
    };
    if !url.username().is_empty() {
        if matches!(login, Login::Nobody) {
            let plain = |text: &str| percent_decoded(text);
            let word = url.password().map(plain).unwrap_or_default();
            login = Login::Basic(percent_decoded(url.username()), Secret::new(word));
        }
        // Both fail for addresses without a host only.
        let _ = url.set_username("");
        let _ = url.set_password(None);
    }
    url.set_query(None);
    url.set_fragment(None);
    Ok((url.as_str().trim_end_matches('/').to_owned(), login))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match (first, code.and_then(|two| u8::from_str_radix(two, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Client {
    /// Prepares a client; asks nothing.
    pub(super) fn new(config: &MlflowConfig) -> Result<Self, TrackingError> {
        let (base, login) = address(config)?;
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_LIMIT)
            .pool_idle_timeout(IDLE_LIMIT)
            // A redirected POST becomes a GET, and credentials would go where nobody sent them.
            .redirect(redirect::Policy::none())
            .user_agent(concat!("boxwright/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = &config.ca_file {
            for certificate in certificates(path)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        let http =
            builder.build().map_err(|error| config_error("no client for it".into(), Some(error.into())))?;
        let (not_before, answers) = (Mutex::new(None), AtomicU64::new(0));
        Ok(Self { http, base, login, deadline: DEADLINE, not_before, answers })
    }

    pub(super) fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// The address, without credentials.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// How often the server answered as one that works does: it did what was asked, or said in its own words why not.
    pub(super) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Asks `GET /api/2.0/mlflow/{operation}`.
    pub(super) async fn get(
        &self,
        operation: &'static str,
        query: &[(&str, &str)],
    ) -> Result<Json, TrackingError> {
        let url = format!("{}/api/2.0/mlflow/{operation}", self.base);
        self.ask(operation, self.http.request(Method::GET, url).query(query)).await
    }

    /// Asks `POST /api/2.0/mlflow/{operation}`.
    pub(super) async fn post(&self, operation: &'static str, body: &Json) -> Result<Json, TrackingError> {
        let url = format!("{}/api/2.0/mlflow/{operation}", self.base);
        self.ask(operation, self.http.request(Method::POST, url).json(body)).await
    }

    async fn ask(&self, operation: &'static str, request: RequestBuilder) -> Result<Json, TrackingError> {
        let answer = match self.send(operation, request).await {
            Ok(answer) => self.read(operation, answer).await,
            Err(error) => Err(error),
        };
        if matches!(answer, Ok(_) | Err(TrackingError::Missing { .. } | TrackingError::Refused { .. })) {
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }

    /// Puts a file to `url`, which must lie on this server.
    pub(super) async fn put(&self, url: &str, bytes: Vec<u8>) -> Result<(), TrackingError> {
        let operation = "put artifact";
        let request = self.http.request(Method::PUT, url).header("content-type", "application/octet-stream");
        self.send(operation, request.body(bytes)).await.map(|_| ())
    }

    async fn send(
        &self,
        operation: &'static str,
        request: RequestBuilder,
    ) -> Result<Response, TrackingError> {
        if let Some(wait_s) = self.patience() {
            return Err(TrackingError::Busy { operation, wait_s });
        }
        let request = match &self.login {
            Login::Nobody => request,
            Login::Basic(name, word) => request.basic_auth(name, Some(word.expose())),
            Login::Token(token) => request.bearer_auth(token.expose()),
        };
        let answer = request.timeout(self.deadline).send().await;
        let answer = answer.map_err(|error| self.silent(operation, error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(self.failure(operation, answer).await)
    }

    /// Seconds that are still to be waited.
    fn patience(&self) -> Option<u64> {
        let mut not_before = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        let left = not_before.and_then(|at| at.checked_duration_since(Instant::now()));
        if left.is_none() {
            *not_before = None;
        }
        left.map(|left| left.as_secs() + 1)
    }

    fn silent(&self, operation: &'static str, error: reqwest::Error) -> TrackingError {
        let limit = if error.is_connect() { self.deadline.min(CONNECT_LIMIT) } else { self.deadline };
        let is_late = error.is_timeout();
        let source = Some(error.without_url().into());
        TrackingError::Silent { operation, limit_s: limit.as_secs_f64(), is_late, source }
    }

    async fn failure(&self, operation: &'static str, answer: Response) -> TrackingError {
        let status = answer.status();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let header = answer.headers().get("retry-after").and_then(|value| value.to_str().ok());
            let asked = header.and_then(|value| value.trim().parse().ok()).map(Duration::from_secs);
            let is_asking = status == StatusCode::TOO_MANY_REQUESTS || asked.is_some();
            if is_asking {
                let wait = asked.unwrap_or(WAIT_DEFAULT).min(WAIT_MAX);
                let mut not_before = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
                *not_before = Some(Instant::now() + wait);
                return TrackingError::Busy { operation, wait_s: wait.as_secs() };
            }
        }
        let target = answer.headers().get("location").and_then(|value| value.to_str().ok()).map(short);
        let text = match self.bytes(operation, answer).await {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => error.to_string(),
        };
        let told: Json = serde_json::from_str(&text).unwrap_or(Json::Null);
        let code = told["error_code"].as_str().unwrap_or("no code").to_owned();
        let said = short(told["message"].as_str().unwrap_or(&text));
        let number = status.as_u16();
        match number {
            401 | 403 => TrackingError::Credentials { operation, status: number, said },
            300..=399 => {
                let to = target.unwrap_or_default();
                let said = format!("it redirects to {to}; set that address");
                TrackingError::Failed { operation, status: number, said }
            }
            // A proxy before the server does not take so much at once.
            413 => TrackingError::Refused { operation, status: number, code, said },
            // Only the server's own word counts: a page of some other server answers 400 or 404, too.
            400..=499 if !told["error_code"].is_string() => {
                let said = format!("not an answer of a tracking server: {said}");
                TrackingError::Failed { operation, status: number, said }
            }
            404 => TrackingError::Missing { operation, said },
            408 | 425 | 500.. => TrackingError::Failed { operation, status: number, said },
            _ => TrackingError::Refused { operation, status: number, code, said },
        }
    }

    async fn bytes(&self, operation: &'static str, mut answer: Response) -> Result<Vec<u8>, TrackingError> {
        let status = answer.status().as_u16();
        let mut bytes = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|error| self.silent(operation, error))? {
            if bytes.len() + part.len() > ANSWER_BYTES_MAX {
                let said = format!("its answer is longer than {ANSWER_BYTES_MAX} bytes");
                return Err(TrackingError::Failed { operation, status, said });
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes)
    }

    async fn read(&self, operation: &'static str, answer: Response) -> Result<Json, TrackingError> {
        let status = answer.status().as_u16();
        let bytes = self.bytes(operation, answer).await?;
        serde_json::from_slice(&bytes).map_err(|error| TrackingError::Failed {
            operation,
            status,
            said: format!("its answer is no JSON ({error}); is this a tracking server?"),
        })
    }
}

/// The beginning of what somebody else said, in one line.
pub(super) fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(uri: &str) -> MlflowConfig {
        MlflowConfig { tracking_uri: Some(uri.to_owned()), ..MlflowConfig::default() }
    }

    #[test]
    fn credentials_leave_the_address() {
        let (base, login) = address(&config("http://me:p%40ss@host:5000/sub/?x=1")).expect("an address");
        assert_eq!(base, "http://host:5000/sub");
        assert!(matches!(login, Login::Basic(name, word) if name == "me" && word.expose() == "p@ss"));
        let token = MlflowConfig { token: Some(Secret::new("t")), ..config("http://me:x@host") };
        let (_, login) = address(&token).expect("an address");
        assert!(matches!(login, Login::Token(word) if word.expose() == "t"));
    }

    #[test]
    fn a_bad_configuration_is_named_without_its_secrets() {
        for uri in ["", "host:5000", "file:///x", "http://", "http://u:hunter2@[", "ftp://u:hunter2@h"] {
            let Err(error) = Client::new(&config(uri)) else { panic!("{uri:?} was taken") };
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        let missing = MlflowConfig { ca_file: Some("/no/such/file".into()), ..config("https://host") };
        assert!(Client::new(&missing).is_err());
    }
}
