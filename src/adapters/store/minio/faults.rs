//! What an answer of the server, or none, means.
//!
//! The crate keeps network faults, damaged answers and bad arguments in one variant; they are taken apart here.

use minio::s3::error::{Error, IoError, NetworkError, S3ServerError, ValidationErr};
use minio::s3::minio_error_response::MinioErrorCode;

use crate::adapters::store::error::{Cause, StoreError};

/// What the server said, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{code}{}{message}", if message.is_empty() { "" } else { ": " })]
struct Reply {
    code: String,
    message: String,
}

/// Longest message of a server that is kept.
const MESSAGE_CHARS_MAX: usize = 300;

/// A failed request.
pub(super) struct Fault {
    /// What it means.
    pub error: StoreError,
    /// Whether the same request may succeed soon.
    pub soon: Soon,
}

/// Whether the same request may succeed soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Soon {
    /// No.
    No,
    /// Nobody listens there.
    NotListening,
    /// Nobody answered in time.
    Silent,
    /// A fault of the moment.
    Yes,
}

/// The meaning of a failed request: `what` was asked of `object`.
pub(super) fn read(what: &str, object: &str, error: Error) -> Fault {
    match error {
        Error::S3Server(S3ServerError::S3Error(reply)) => {
            let code = match reply.code() {
                MinioErrorCode::OtherError(code) => code,
                code => format!("{code:?}"),
            };
            let message = reply.message().as_deref().unwrap_or_default();
            let message = message.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect();
            by_code(what, object, Reply { code, message })
        }
        Error::S3Server(S3ServerError::InvalidServerResponse { http_status_code, message, .. }) => {
            by_status(what, object, http_status_code, message)
        }
        Error::S3Server(S3ServerError::HttpError(status, message)) => {
            by_status(what, object, status, message)
        }
        Error::Network(NetworkError::ServerError(status)) => by_status(what, object, status, String::new()),
        Error::Network(NetworkError::ReqwestError(error))
        | Error::Validation(ValidationErr::HttpError(error)) => by_network(what, error),
        Error::DriveIo(IoError::IOError(error)) => unavailable(what, Box::new(error), Soon::Yes),
        // An answer that is no answer: cut off, or not of this protocol.
        Error::Validation(
            error @ (ValidationErr::XmlParseError(_)
            | ValidationErr::XmlError { .. }
            | ValidationErr::StrError { .. }
            | ValidationErr::Utf8Error(_)
            | ValidationErr::InvalidETag(_)
            | ValidationErr::ContentLengthUnknown),
        ) => unavailable(what, Box::new(error), Soon::Yes),
        Error::Validation(error) => Fault {
            error: StoreError::Refused { what: what.to_owned(), source: Some(Box::new(error)) },
            soon: Soon::No,
        },
    }
}

fn unavailable(what: &str, source: Cause, soon: Soon) -> Fault {
    Fault { error: StoreError::Unavailable { what: what.to_owned(), source: Some(source) }, soon }
}

fn by_network(what: &str, error: reqwest::Error) -> Fault {
    let soon = if error.is_connect() { Soon::NotListening } else { Soon::Yes };
    // Who made the address or the certificate wrong will not be helped by waiting.
    if error.is_builder() {
        let source: Option<Cause> = Some(Box::new(error));
        return Fault { error: StoreError::Config { what: what.to_owned(), source }, soon: Soon::No };
    }
    unavailable(what, Box::new(error), soon)
}

fn by_status(what: &str, object: &str, status: u16, message: String) -> Fault {
    let message: String = message.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect();
    let reply = Reply { code: format!("HTTP {status}"), message };
    let what = what.to_owned();
    let (error, soon) = match status {
        404 => (StoreError::Missing { object: object.to_owned() }, Soon::No),
        401 | 403 => (StoreError::Denied { what, source: Some(Box::new(reply)) }, Soon::No),
        507 => (StoreError::Full { what, source: Some(Box::new(reply)) }, Soon::No),
        501 => (StoreError::Refused { what, source: Some(Box::new(reply)) }, Soon::No),
        408 | 425 | 429 | 500.. => {
            (StoreError::Unavailable { what, source: Some(Box::new(reply)) }, Soon::Yes)
        }
        _ => (StoreError::Refused { what, source: Some(Box::new(reply)) }, Soon::No),
    };
    Fault { error, soon }
}

fn by_code(what: &str, object: &str, reply: Reply) -> Fault {
    let code = reply.code.to_lowercase();
    let code = code.strip_prefix("xminio").unwrap_or(&code);
    let what = what.to_owned();
    let (error, soon) = match code {
        "nosuchkey" | "nosuchbucket" | "nosuchversion" | "resourcenotfound" => {
            (StoreError::Missing { object: object.to_owned() }, Soon::No)
        }
        "accessdenied"
        | "invalidaccesskeyid"
        | "signaturedoesnotmatch"
        | "invalidtoken"
        | "expiredtoken"
        | "accountproblem"
        | "allaccessdisabled"
        | "invalidsecurity"
        | "authorizationheadermalformed"
        | "requesttimetooskewed" => (StoreError::Denied { what, source: Some(Box::new(reply)) }, Soon::No),
        "storagefull"
        | "insufficientstorage"
        | "insufficientreadquorum"
        | "adminbucketquotaexceeded"
        | "quotaexceeded"
        | "diskfull" => (StoreError::Full { what, source: Some(Box::new(reply)) }, Soon::No),
        // Damaged on the way, or the server's moment.
        "contentsha256mismatch"
        | "xamzcontentsha256mismatch"
        | "xamzcontentchecksummismatch"
        | "baddigest"
        | "incompletebody"
        | "internalerror"
        | "slowdown"
        | "slowdownread"
        | "slowdownwrite"
        | "serviceunavailable"
        | "servernotinitialized"
        | "requesttimeout"
        | "requesttimedout"
        | "operationtimedout"
        | "operationaborted"
        | "busy"
        | "backenddown"
        | "readquorum"
        | "writequorum" => (StoreError::Unavailable { what, source: Some(Box::new(reply)) }, Soon::Yes),
        _ => (StoreError::Refused { what, source: Some(Box::new(reply)) }, Soon::No),
    };
    Fault { error, soon }
}

/// True when the server no longer knows the upload: it was completed or given up.
pub(super) fn is_upload_gone(error: &StoreError) -> bool {
    is_code(error, &["NoSuchUpload"])
}

/// True when the object was replaced between two requests.
pub(super) fn is_replaced(error: &StoreError) -> bool {
    is_code(error, &["PreconditionFailed", "HTTP 412", "InvalidRange", "HTTP 416"])
}

/// True when an object was not stored because the key does not hold what was expected, or was just being written to.
pub(super) fn is_unexpected(error: &StoreError) -> bool {
    is_code(error, &["PreconditionFailed", "HTTP 412", "ConditionalRequestConflict", "HTTP 409"])
}

/// True when the server does not take a request with a condition.
pub(super) fn is_not_taken(error: &StoreError) -> bool {
    let codes =
        ["NotImplemented", "MethodNotAllowed", "HTTP 501", "InvalidRequest", "InvalidArgument", "HTTP 400"];
    is_code(error, &codes)
}

fn is_code(error: &StoreError, codes: &[&str]) -> bool {
    let StoreError::Refused { source: Some(source), .. } = error else { return false };
    let reply = source.downcast_ref::<Reply>();
    reply.is_some_and(|reply| codes.iter().any(|code| reply.code.eq_ignore_ascii_case(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_states_are_told_apart() {
        let reply = |code: &str| by_code("put", "b/k", Reply { code: code.into(), message: String::new() });
        assert!(matches!(reply("NoSuchKey").error, StoreError::Missing { .. }));
        assert!(matches!(reply("SignatureDoesNotMatch").error, StoreError::Denied { .. }));
        assert!(matches!(reply("XMinioStorageFull").error, StoreError::Full { .. }));
        assert_eq!(reply("SlowDown").soon, Soon::Yes);
        assert_eq!(reply("InvalidArgument").soon, Soon::No);
        assert!(is_replaced(&reply("PreconditionFailed").error));
        assert!(is_unexpected(&reply("ConditionalRequestConflict").error));
        assert!(is_upload_gone(&reply("NoSuchUpload").error));
        let state = |status| by_status("put", "b/k", status, String::new());
        assert!(matches!(state(507).error, StoreError::Full { .. }));
        assert!(matches!(state(403).error, StoreError::Denied { .. }));
        assert_eq!((state(503).soon, state(500).soon, state(429).soon), (Soon::Yes, Soon::Yes, Soon::Yes));
        assert_eq!((state(400).soon, state(501).soon), (Soon::No, Soon::No));
        assert!(is_unexpected(&state(412).error) && is_not_taken(&state(501).error));
    }
}
