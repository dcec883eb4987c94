//! Objects on their way from the server.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use minio::s3::error::Error;
use minio::s3::types::S3Api;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout};

use super::attempts::{Tries, limit};
use super::faults::{self, Soon};
use super::upload::io;
use super::{MinioStore, Seen};
use crate::adapters::store::error::StoreError;
use crate::adapters::store::local::Arriving;
use crate::adapters::store::{BucketName, ObjectHead, ObjectKey, Versioned, blocking, hex};

/// Longest silence of a server that sends an object.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Further tries of an object that was replaced while it was fetched.
const REPLACED_TRIES_MAX: u32 = 5;
/// The first pause before it is read again.
const TORN_PAUSE: Duration = Duration::from_millis(20);
/// Bytes handed to the disk at one time.
const PIECE_BYTES: usize = 1 << 20;

/// Takes an object in pieces, in order.
trait Taker: Send {
    /// Takes a piece; what cannot be taken ends the transfer.
    fn take(&mut self, piece: Vec<u8>) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// To a file.
struct ToFile(Option<Arriving>);

impl Taker for ToFile {
    async fn take(&mut self, piece: Vec<u8>) -> Result<(), StoreError> {
        let Some(mut arriving) = self.0.take() else { return Ok(()) };
        let arriving = blocking(move || {
            arriving.write(&piece)?;
            Ok(arriving)
        });
        self.0 = Some(arriving.await?);
        Ok(())
    }
}

/// To memory.
struct ToMemory(Vec<u8>);

impl Taker for ToMemory {
    async fn take(&mut self, piece: Vec<u8>) -> Result<(), StoreError> {
        self.0.extend_from_slice(&piece);
        Ok(())
    }
}

/// To a checksum.
struct ToHash(Sha256);

impl Taker for ToHash {
    async fn take(&mut self, piece: Vec<u8>) -> Result<(), StoreError> {
        let hash = std::mem::take(&mut self.0);
        self.0 = blocking(move || Ok(hash.chain_update(&piece))).await?;
        Ok(())
    }
}

impl MinioStore {
    /// An object to a file; again from the start when it was replaced in the middle of it.
    pub(super) async fn download(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        let mut tries = 0;
        loop {
            match self.download_once(bucket, key, path, expected).await {
                Err(error) if faults::is_replaced(&error) && tries < REPLACED_TRIES_MAX => tries += 1,
                done => return done,
            }
        }
    }

    async fn download_once(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        let seen = self.look(bucket, key).await?;
        let target = path.to_owned();
        let mut taker = ToFile(Some(blocking(move || Arriving::begin(&target)).await?));
        self.transfer(bucket, key, &seen, &mut taker).await?;
        let ToFile(Some(arriving)) = taker else {
            return Err(StoreError::Unavailable { what: format!("get {bucket}/{key}"), source: None });
        };
        let (bytes, sha256) = arriving.seen();
        if let Some(expected) = expected.or(seen.head.sha256.as_deref()).filter(|known| *known != sha256) {
            return Err(StoreError::Integrity {
                object: format!("{bucket}/{key}"),
                expected: format!("sha256 {expected}"),
                found: format!("{bytes} bytes of sha256 {sha256}"),
            });
        }
        blocking(move || arriving.finish()).await?;
        Ok(ObjectHead { sha256: Some(sha256), ..seen.head })
    }

    /// A small object to memory; the same.
    pub(super) async fn read(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Versioned, StoreError> {
        let mut tries = 0;
        loop {
            let read = self.read_once(bucket, key, bytes_max).await;
            let is_torn = match &read {
                Ok((_, is_whole)) => !is_whole,
                Err(error) => faults::is_replaced(error),
            };
            if !is_torn || tries >= REPLACED_TRIES_MAX {
                // One that stays so is damaged, which whoever asked sees by its content.
                return read.map(|(read, _)| read);
            }
            tries += 1;
            sleep(TORN_PAUSE * tries).await;
        }
    }

    /// False beside what is not what the server says of it: small servers show an object while they write it.
    async fn read_once(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<(Versioned, bool), StoreError> {
        let seen = self.look(bucket, key).await?;
        let bytes = seen.head.bytes;
        if bytes > bytes_max {
            return Err(StoreError::TooLarge { object: format!("{bucket}/{key}"), bytes, bytes_max });
        }
        let mut taker = ToMemory(Vec::with_capacity(bytes as usize));
        self.transfer(bucket, key, &seen, &mut taker).await?;
        let is_whole = seen.head.sha256.is_none_or(|sha256| sha256 == hex(&Sha256::digest(&taker.0)));
        Ok((Versioned { bytes: taker.0, version: seen.head.etag }, is_whole))
    }

    pub(super) async fn hash_of(&self, bucket: &BucketName, key: &ObjectKey) -> Result<String, StoreError> {
        let seen = self.look(bucket, key).await?;
        let mut taker = ToHash(Sha256::new());
        self.transfer(bucket, key, &seen, &mut taker).await?;
        Ok(hex(&taker.0.finalize()))
    }

    /// Passes the content of the object that was seen on; where a transfer breaks off, the next one begins.
    async fn transfer<T: Taker>(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        seen: &Seen,
        taker: &mut T,
    ) -> Result<(), StoreError> {
        let object = format!("{bucket}/{key}");
        let what = format!("get {object}");
        let deadline = Instant::now() + limit(seen.head.bytes) * 2;
        let mut tries = Tries::new();
        let mut at = 0;
        while at < seen.head.bytes {
            let before = at;
            let end = self.transfer_once(bucket, key, seen, &mut at, taker).await;
            let (error, soon) = match end {
                Ok(()) => (StoreError::Unavailable { what: what.clone(), source: None }, Soon::Yes),
                Err(Broken::Taker(error)) => return Err(error),
                Err(Broken::Silent) => {
                    let limit_ms = SILENCE_MAX.as_millis() as u64;
                    (StoreError::Timeout { what: what.clone(), limit_ms }, Soon::Silent)
                }
                Err(Broken::Request(error)) => {
                    let fault = faults::read(&what, &object, error);
                    (fault.error, fault.soon)
                }
            };
            if at >= seen.head.bytes {
                break;
            }
            if at > before {
                tries.reset();
            }
            if Instant::now() > deadline || !tries.again(soon).await {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Passes on what one request gives, from `at` on, which moves along.
    async fn transfer_once<T: Taker>(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        seen: &Seen,
        at: &mut u64,
        taker: &mut T,
    ) -> Result<(), Broken> {
        let request = self.client.get_object(bucket.as_str(), key.as_str()).map_err(Error::from)?;
        // Another object under the same key must not continue this one.
        let request = request.offset((*at > 0).then_some(*at)).match_etag(seen.head.etag.clone());
        let answer = timeout(limit(0), request.build().send()).await.map_err(|_| Broken::Silent)??;
        let (mut body, _) = answer.into_boxed_stream()?;
        let mut piece: Vec<u8> = Vec::with_capacity(PIECE_BYTES);
        let end = loop {
            let next = match timeout(SILENCE_MAX, body.next()).await {
                Ok(Some(Ok(next))) => next,
                Ok(None) => break Ok(()),
                Ok(Some(Err(error))) => break Err(Broken::Request(io(error))),
                Err(_) => break Err(Broken::Silent),
            };
            // A server that sends more than it said sends something else.
            let room = (seen.head.bytes - *at) as usize - piece.len();
            piece.extend_from_slice(&next[..next.len().min(room)]);
            if piece.len() >= PIECE_BYTES {
                let full = std::mem::replace(&mut piece, Vec::with_capacity(PIECE_BYTES));
                let length = full.len() as u64;
                taker.take(full).await.map_err(Broken::Taker)?;
                *at += length;
            }
        };
        let length = piece.len() as u64;
        taker.take(piece).await.map_err(Broken::Taker)?;
        *at += length;
        end
    }
}

/// Why a transfer ended early.
enum Broken {
    /// The request failed.
    Request(Error),
    /// The server fell silent.
    Silent,
    /// What arrived could not be taken.
    Taker(StoreError),
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Request(error)
    }
}
