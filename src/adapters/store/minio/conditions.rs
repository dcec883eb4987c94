//! Storing on a condition, on servers that know conditions and on those that do not.
//!
//! A condition is a header of the request: `If-Match` with the version that has to be there, or `If-None-Match: *`. Servers
//! that do not know them refuse the request, or store without a word. Which one a server is shows at the first object that
//! is to replace a known version: it is sent with a version that never was. Whoever stores that knows no conditions.

use std::sync::atomic::{AtomicU8, Ordering};

use minio::s3::multimap_ext::{Multimap, MultimapExt};
use sha2::{Digest, Sha256};

use super::{MinioStore, faults};
use crate::adapters::store::error::StoreError;
use crate::adapters::store::{BucketName, Expected, ObjectHead, ObjectKey, ObjectStore, found, hex};

/// A version that no object has.
const NEVER: &str = "00000000000000000000000000000000";

/// What is known of a server's way with conditions.
#[derive(Debug, Default)]
pub(super) struct Conditions(AtomicU8);

/// The same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    NotYet,
    Kept,
    Ignored,
}

impl Conditions {
    fn known(&self) -> Known {
        match self.0.load(Ordering::Relaxed) {
            0 => Known::NotYet,
            1 => Known::Kept,
            _ => Known::Ignored,
        }
    }

    /// What the answer to a version that never was tells of the server.
    fn told(&self, sent: Result<(), StoreError>) -> Result<Answer, StoreError> {
        if matches!(sent, Err(StoreError::Missing { .. })) {
            return Ok(Answer::Unexpected);
        }
        let answer = answer_of(sent)?;
        self.learn(if matches!(answer, Answer::Unexpected) { Known::Kept } else { Known::Ignored });
        Ok(answer)
    }

    fn learn(&self, known: Known) {
        if self.0.swap(known as u8, Ordering::Relaxed) != known as u8 && known == Known::Ignored {
            tracing::warn!(
                "the store does not know conditional writes (If-Match): manifests are guarded by a look before each write only"
            );
        }
    }
}

fn condition(name: &str, value: &str) -> Multimap {
    let mut headers = Multimap::new();
    headers.add(name, value);
    headers
}

/// What came of one request with a condition.
enum Answer {
    Stored,
    Unexpected,
    /// The server does not take such a request.
    NotTaken,
}

impl MinioStore {
    /// Stores where the key holds what is expected; `None` where it does not.
    pub(super) async fn put_expected(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        expected: Expected<'_>,
    ) -> Result<Option<ObjectHead>, StoreError> {
        let (length, sha256) = (bytes.len() as u64, hex(&Sha256::digest(&bytes)));
        let send = |headers: Multimap| self.put_one(bucket, key, bytes.clone(), &sha256, headers);
        let answer = match (expected, self.conditions.known()) {
            (Expected::Anything, _) | (_, Known::Ignored) => Answer::NotTaken,
            (Expected::Nothing, _) => answer_of(send(condition("If-None-Match", "*")).await)?,
            (Expected::Version(version), known) => {
                let first = match known {
                    Known::NotYet => {
                        self.conditions.told(send(condition("If-Match", &quoted(NEVER))).await)?
                    }
                    _ => Answer::Unexpected,
                };
                match first {
                    Answer::Unexpected => there(send(condition("If-Match", &quoted(version))).await)?,
                    answer => answer,
                }
            }
        };
        match answer {
            Answer::Stored => {}
            // Without a condition the server says itself what else is wrong.
            Answer::NotTaken => send(Multimap::new()).await?,
            Answer::Unexpected => {
                // An earlier try may have succeeded without our hearing of it.
                let there = found(self.head(bucket, key).await)?;
                return Ok(there.filter(|head| head.sha256.as_ref() == Some(&sha256)));
            }
        }
        self.verify(bucket, key, length, &sha256).await.map(Some)
    }
}

fn quoted(version: &str) -> String {
    format!("\"{version}\"")
}

fn answer_of(sent: Result<(), StoreError>) -> Result<Answer, StoreError> {
    match sent {
        Ok(()) => Ok(Answer::Stored),
        Err(error) if faults::is_unexpected(&error) => Ok(Answer::Unexpected),
        Err(error) if faults::is_not_taken(&error) => Ok(Answer::NotTaken),
        Err(error) => Err(error),
    }
}

/// The answer to a version that has to be there, of a server that knows conditions.
fn there(sent: Result<(), StoreError>) -> Result<Answer, StoreError> {
    match sent {
        Ok(()) => Ok(Answer::Stored),
        // Some say that what should be there is not.
        Err(StoreError::Missing { .. }) => Ok(Answer::Unexpected),
        Err(error) if faults::is_unexpected(&error) => Ok(Answer::Unexpected),
        Err(error) => Err(error),
    }
}
