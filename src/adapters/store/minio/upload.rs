//! Objects on their way to the server.

use std::sync::Arc;

use futures_util::{FutureExt, StreamExt, stream};
use minio::s3::builders::{ObjectContent, PutObject, UploadPart};
use minio::s3::error::{Error, IoError};
use minio::s3::multimap_ext::{Multimap, MultimapExt};
use minio::s3::response_traits::HasEtagFromHeaders;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::{self, PartInfo, S3Api, UploadId};
use minio::s3::utils::{ChecksumAlgorithm, b64_encode};
use sha2::{Digest, Sha256};

use super::{MinioStore, SHA256_NAME, faults};
use crate::adapters::store::error::StoreError;
use crate::adapters::store::{BucketName, LocalFile, ObjectHead, ObjectKey, blocking, found, hex};

/// Parts of one object, as the protocol limits them.
const PARTS_MAX: u64 = 10_000;
/// Bytes of parts on their way at one time; at least one part is.
const IN_FLIGHT_BYTES: u64 = 24 << 20;
/// Parts on their way at one time.
const IN_FLIGHT_MAX: u64 = 4;

/// A part that was read.
struct Part {
    number: u16,
    bytes: u64,
    data: Arc<SegmentedBytes>,
}

/// Reads the next part of a file of `count` parts, and carries the hash of all on. The last part is given only when all
/// of them are what was hashed at first.
async fn next_part(
    (file, part_bytes, count): &(LocalFile, u64, u64),
    index: u64,
    hash: Sha256,
) -> Result<Option<(Part, Sha256)>, StoreError> {
    if index >= *count {
        return Ok(None);
    }
    let (source, part_bytes) = (file.clone(), *part_bytes);
    let (bytes, hash) = blocking(move || {
        let bytes = source.read_at(index * part_bytes, part_bytes)?;
        let hash = hash.chain_update(&bytes);
        Ok((bytes, hash))
    })
    .await?;
    if index + 1 == *count && hex(&hash.clone().finalize()) != file.sha256 {
        return Err(file.changed());
    }
    let length = bytes.len() as u64;
    let part = Part { number: (index + 1) as u16, bytes: length, data: segmented(bytes).await? };
    Ok(Some((part, hash)))
}

async fn segmented(bytes: Vec<u8>) -> Result<Arc<SegmentedBytes>, StoreError> {
    let segments = ObjectContent::from(bytes).to_segmented_bytes().await;
    segments.map(Arc::new).map_err(|source| StoreError::Unavailable {
        what: "hand bytes over".into(),
        source: Some(Box::new(source)),
    })
}

fn metadata(sha256: &str) -> Multimap {
    let mut metadata = Multimap::new();
    metadata.add(format!("x-amz-meta-{SHA256_NAME}"), sha256);
    metadata
}

impl MinioStore {
    /// Sends a file, in parts when it is large, and verifies what the server has.
    pub(super) async fn upload(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<ObjectHead, StoreError> {
        if file.bytes <= self.part_bytes {
            let source = file.clone();
            let bytes = blocking(move || source.read_at(0, u64::MAX)).await?;
            // Read again since it was hashed: it may have been changed in place.
            if hex(&Sha256::digest(&bytes)) != file.sha256 {
                return Err(file.changed());
            }
            self.put_one(bucket, key, bytes, &file.sha256, Multimap::new()).await?;
        } else {
            self.put_parts(bucket, key, file).await?;
        }
        self.verify(bucket, key, file.bytes, &file.sha256).await
    }

    /// Sends an object in one request, with further headers.
    pub(super) async fn put_one(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        sha256: &str,
        headers: Multimap,
    ) -> Result<(), StoreError> {
        let object = format!("{bucket}/{key}");
        let length = bytes.len() as u64;
        let data = segmented(bytes).await?;
        self.attempt(&format!("put {object}"), &object, length, || async {
            let inner = UploadPart::builder()
                .client(self.client.clone())
                .bucket(types::BucketName::new(bucket.as_str())?)
                .object(types::ObjectKey::new(key.as_str())?)
                .extra_headers(Some(headers.clone()))
                .user_metadata(Some(metadata(sha256)))
                .checksum_algorithm(Some(ChecksumAlgorithm::SHA256))
                .data(data.clone())
                .build();
            PutObject::builder().inner(inner).build().send().await.map(|_| ())
        })
        .await
    }

    /// Sends a file in parts. They are read one after the other while others are on their way.
    async fn put_parts(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<(), StoreError> {
        let object = format!("{bucket}/{key}");
        let what = format!("begin {object}");
        let upload = self.attempt(&what, &object, 0, || async {
            let request = self.client.create_multipart_upload(bucket.as_str(), key.as_str())?;
            let answer = request.user_metadata(Some(metadata(&file.sha256))).build().send().await?;
            answer.upload_id().await.map_err(Error::from)
        });
        let upload = Upload { store: self, bucket, key, id: upload.await?, is_open: true };
        let part_bytes = self.part_bytes.max(file.bytes.div_ceil(PARTS_MAX));
        let in_flight = (IN_FLIGHT_BYTES / part_bytes).clamp(1, IN_FLIGHT_MAX) as usize;
        let parts = upload.send(file, part_bytes, in_flight).await;
        match parts {
            Ok(parts) => upload.complete(parts, file).await,
            Err(error) => {
                upload.abort().await;
                Err(error)
            }
        }
    }

    /// The server has what was sent: its size, the checksum kept with it, and its own where it has one. When it has
    /// neither, the object is read back.
    pub(super) async fn verify(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: u64,
        sha256: &str,
    ) -> Result<ObjectHead, StoreError> {
        let object = format!("{bucket}/{key}");
        let seen = self.look(bucket, key).await?;
        let damaged = |found: String| StoreError::Integrity {
            object: object.clone(),
            expected: format!("{bytes} bytes of sha256 {sha256}"),
            found,
        };
        if seen.head.bytes != bytes {
            return Err(damaged(format!("{} bytes", seen.head.bytes)));
        }
        if let Some(other) = seen.head.sha256.as_ref().filter(|kept| *kept != sha256) {
            return Err(damaged(format!("another object of sha256 {other}")));
        }
        let own = (0..sha256.len() / 2).map(|i| u8::from_str_radix(&sha256[2 * i..2 * i + 2], 16));
        let own: Vec<u8> = own.collect::<Result<_, _>>().unwrap_or_default();
        if let Some(other) = seen.checksum.as_ref().filter(|sum| **sum != b64_encode(&own)) {
            return Err(damaged(format!("the server's checksum {other}")));
        }
        if seen.head.sha256.is_none() && seen.checksum.is_none() {
            let back = self.hash_of(bucket, key).await?;
            if back != sha256 {
                return Err(damaged(format!("sha256 {back}")));
            }
        }
        Ok(ObjectHead { sha256: Some(sha256.to_owned()), ..seen.head })
    }
}

/// An upload in parts that the server knows of.
struct Upload<'a> {
    store: &'a MinioStore,
    bucket: &'a BucketName,
    key: &'a ObjectKey,
    id: UploadId,
    is_open: bool,
}

impl Upload<'_> {
    /// Reads and sends all parts.
    async fn send(
        &self,
        file: &LocalFile,
        part_bytes: u64,
        in_flight: usize,
    ) -> Result<Vec<PartInfo>, StoreError> {
        let count = file.bytes.div_ceil(part_bytes);
        let source = (file.clone(), part_bytes, count);
        let parts = stream::try_unfold((source, 0, Sha256::new()), |(source, index, hash)| async move {
            let Some((part, hash)) = next_part(&source, index, hash).await? else { return Ok(None) };
            Ok(Some((part, (source, index + 1, hash))))
        });
        let sent = parts.boxed().map(|part| async { self.send_one(part?).await }.boxed());
        let sent = sent.buffer_unordered(in_flight);
        let mut sent = std::pin::pin!(sent);
        let mut infos = Vec::with_capacity(count as usize);
        while let Some(info) = sent.next().await {
            infos.push(info?);
        }
        infos.sort_by_key(|info| info.number);
        Ok(infos)
    }

    async fn send_one(&self, part: Part) -> Result<PartInfo, StoreError> {
        let object = format!("{}/{}", self.bucket, self.key);
        let what = format!("put part {} of {object}", part.number);
        let client = &self.store.client;
        self.store
            .attempt(&what, &object, part.bytes, || async {
                let request = UploadPart::builder()
                    .client(client.clone())
                    .bucket(types::BucketName::new(self.bucket.as_str())?)
                    .object(types::ObjectKey::new(self.key.as_str())?)
                    .upload_id(Some(self.id.to_string()))
                    .part_number(Some(part.number))
                    .data(part.data.clone());
                let answer = request.build().send().await?;
                Ok(PartInfo::new(part.number, answer.etag()?, part.bytes, None))
            })
            .await
    }

    /// Makes the parts an object.
    async fn complete(mut self, parts: Vec<PartInfo>, file: &LocalFile) -> Result<(), StoreError> {
        let object = format!("{}/{}", self.bucket, self.key);
        let (bucket, key) = (self.bucket.as_str(), self.key.as_str());
        let what = format!("complete {object}");
        let completed = self.store.attempt(&what, &object, file.bytes, || async {
            let request =
                self.store.client.complete_multipart_upload(bucket, key, &self.id, parts.clone())?;
            request.build().send().await.map(|_| ())
        });
        match completed.await {
            Ok(()) => {
                self.is_open = false;
                Ok(())
            }
            Err(error) if faults::is_upload_gone(&error) => {
                self.is_open = false;
                // An earlier try may have succeeded without our hearing of it.
                let there = found(self.store.look(self.bucket, self.key).await)?;
                let is_ours = there.is_some_and(|seen| seen.head.sha256.as_deref() == Some(&file.sha256));
                if is_ours { Ok(()) } else { Err(error) }
            }
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    /// Tells the server to forget the parts, once. What it does not hear it forgets by its own rules.
    async fn abort(mut self) {
        self.is_open = false;
        forget(self.store.clone(), self.bucket.clone(), self.key.clone(), self.id.clone()).await;
    }
}

impl Drop for Upload<'_> {
    /// The delivery was given up in the middle.
    fn drop(&mut self) {
        if self.is_open
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(forget(self.store.clone(), self.bucket.clone(), self.key.clone(), self.id.clone()));
        }
    }
}

async fn forget(store: MinioStore, bucket: BucketName, key: ObjectKey, id: UploadId) {
    let aborted = async {
        let request = store.client.abort_multipart_upload(bucket.as_str(), key.as_str(), &id)?;
        request.build().send().await.map(|_| ())
    };
    let aborted = tokio::time::timeout(super::attempts::limit(0), aborted).await;
    if !matches!(aborted, Ok(Ok(()))) {
        tracing::debug!(%bucket, %key, "an upload in parts could not be given up; the server forgets it later");
    }
}

/// What reading an answer may fail with, in the crate's words.
pub(super) fn io(error: std::io::Error) -> Error {
    Error::DriveIo(IoError::IOError(error))
}
