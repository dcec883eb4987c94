//! A store on a server of the S3 protocol, by way of the `minio` crate.
//!
//! Every request has a deadline in proportion to what it carries and is tried again when the fault is one of the moment.
//! The body of every request is signed with its SHA-256, so the server refuses what was damaged on its way.

mod attempts;
mod conditions;
mod download;
mod faults;
mod upload;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::StreamExt;
use minio::s3::builders::{CopyObjectInternal, CopySource};
use minio::s3::client::Method;
use minio::s3::creds::{Credentials, Provider};
use minio::s3::http::BaseUrl;
use minio::s3::multimap_ext::{Multimap, MultimapExt};
use minio::s3::response_traits::{HasChecksumHeaders, HasEtagFromHeaders};
use minio::s3::types::{self, S3Api, ToStream};
use minio::s3::utils::{ChecksumAlgorithm, urlencode_object_key};
use minio::s3::{MinioClient, MinioClientBuilder};
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::{
    BucketName, Expected, Listed, LocalFile, ObjectHead, ObjectKey, ObjectStore, Versioned, found, hex,
};
use crate::job::secret::Secret;
use crate::job::service::StoreConfig;
use conditions::Conditions;

/// Where the SHA-256 of an object is kept.
const SHA256_NAME: &str = "sha256";
/// Objects of one page of a list.
const PAGE_ITEMS: u16 = 1000;
/// Pages of a list, whatever the server says.
const PAGES_MAX: usize = 10_000;

/// A store on a server.
#[derive(Clone)]
pub struct MinioStore {
    client: MinioClient,
    /// How addresses of objects are made.
    base: BaseUrl,
    part_bytes: u64,
    /// What is known of the server's way with conditions.
    conditions: Arc<Conditions>,
}

/// Gives the keys out for signing and shows them to nobody.
#[derive(Debug)]
struct Keys {
    id: Secret,
    secret: Secret,
}

impl Provider for Keys {
    fn fetch(&self) -> Credentials {
        Credentials {
            access_key: self.id.expose().to_owned(),
            secret_key: self.secret.expose().to_owned(),
            session_token: None,
        }
    }
}

/// The address of a configuration.
fn base_url(config: &StoreConfig) -> Result<BaseUrl, StoreError> {
    let fault = |what: &str, source| StoreError::Config { what: what.to_owned(), source };
    let endpoint = config.endpoint.as_deref().unwrap_or_default();
    if endpoint.contains('@') {
        return Err(fault("its address holds a user; keys belong in the environment or in files", None));
    }
    let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
    if rest.is_none_or(|host| host.trim_end_matches('/').is_empty()) {
        return Err(fault(&format!("address {endpoint:?}; allowed: http://HOST:PORT or https://"), None));
    }
    let mut base: BaseUrl = endpoint
        .trim_end_matches('/')
        .parse()
        .map_err(|error| fault(&format!("address {endpoint:?}"), Some(Box::new(error))))?;
    // An address may name its region itself.
    if base.region.as_str().is_empty() {
        base.region = types::Region::new(&config.region)
            .map_err(|error| fault(&format!("region {:?}", config.region), Some(Box::new(error))))?;
    }
    base.virtual_style = !config.is_path_style;
    Ok(base)
}

impl MinioStore {
    /// The store of a configuration with an endpoint. Asks nothing over the network.
    ///
    /// # Errors
    /// [`StoreError::Config`] for an address, a certificate file or credentials that cannot be used.
    pub fn new(config: &StoreConfig) -> Result<Self, StoreError> {
        let fault = |what: &str, source| StoreError::Config { what: what.to_owned(), source };
        let base = base_url(config)?;
        let keys = match (&config.id, &config.secret) {
            (Some(id), Some(secret)) => Some(Keys { id: id.clone(), secret: secret.clone() }),
            (None, None) => None,
            (Some(_), None) => return Err(fault("the access key has no secret key", None)),
            (None, Some(_)) => return Err(fault("the secret key has no access key", None)),
        };
        let client = MinioClientBuilder::new(base.clone())
            .provider(keys)
            .ssl_cert_file(config.ca_file.as_deref())
            .app_info(Some(("boxwright".into(), env!("CARGO_PKG_VERSION").into())))
            .build()
            .map_err(|error| fault("its certificates or its client", Some(Box::new(error))))?;
        Ok(Self { client, base, part_bytes: config.part_bytes, conditions: Arc::default() })
    }

    async fn look(&self, bucket: &BucketName, key: &ObjectKey) -> Result<Seen, StoreError> {
        let object = format!("{bucket}/{key}");
        self.attempt(&format!("look at {object}"), &object, 0, || async {
            let mut headers = Multimap::new();
            headers.add("x-amz-checksum-mode", "ENABLED");
            let request = self.client.stat_object(bucket.as_str(), key.as_str())?;
            let answer = request.extra_headers(Some(headers)).build().send().await?;
            let whole = answer.get_checksum(ChecksumAlgorithm::SHA256);
            Ok(Seen {
                head: ObjectHead {
                    bytes: answer.size()?,
                    sha256: answer.user_metadata()?.remove(SHA256_NAME).filter(|text| text.len() == 64),
                    etag: answer.etag().ok().map(|etag| etag.as_str().to_owned()),
                },
                // A checksum of parts ends in their number and says nothing of the whole.
                checksum: whole.filter(|sum| !sum.contains('-')),
            })
        })
        .await
    }

    async fn has_bucket(&self, bucket: &BucketName) -> Result<bool, StoreError> {
        let object = format!("bucket {bucket}");
        self.attempt(&format!("look at {object}"), &object, 0, || async {
            self.client.bucket_exists(bucket.as_str())?.build().send().await.map(|answer| answer.exists())
        })
        .await
    }

    async fn page(
        &self,
        bucket: &BucketName,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<(Vec<types::ListEntry>, bool), StoreError> {
        let what = format!("list {bucket}/{prefix}");
        self.attempt(&what, &format!("bucket {bucket}"), 0, || async {
            let request = self.client.list_objects(bucket.as_str())?;
            let request = request.prefix(Some(prefix.to_owned())).recursive(true);
            let request = request.start_after(after.map(str::to_owned)).max_keys(Some(PAGE_ITEMS));
            let mut pages = request.build().to_stream().await;
            match pages.next().await {
                Some(page) => page.map(|page| (page.contents, page.is_truncated)),
                None => Ok((Vec::new(), false)),
            }
        })
        .await
    }
}

/// What a server says of an object.
struct Seen {
    head: ObjectHead,
    /// SHA-256 of the whole that the server computed itself, in base 64.
    checksum: Option<String>,
}

#[async_trait]
impl ObjectStore for MinioStore {
    async fn prepare(&self, bucket: &BucketName) -> Result<(), StoreError> {
        if self.has_bucket(bucket).await? {
            return Ok(());
        }
        let object = format!("bucket {bucket}");
        let what = format!("make {object}");
        let made = self.attempt(&what, &object, 0, || async {
            self.client.create_bucket(bucket.as_str())?.build().send().await.map(|_| ())
        });
        match made.await {
            // Another machine may have made it meanwhile.
            Err(error @ StoreError::Refused { .. }) => {
                if self.has_bucket(bucket).await? {
                    Ok(())
                } else {
                    Err(error)
                }
            }
            made => made,
        }
    }

    async fn put_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        file: &LocalFile,
    ) -> Result<ObjectHead, StoreError> {
        self.upload(bucket, key, file).await
    }

    async fn put_bytes(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
    ) -> Result<ObjectHead, StoreError> {
        let sha256 = hex(&Sha256::digest(&bytes));
        let length = bytes.len() as u64;
        self.put_one(bucket, key, bytes, &sha256, Multimap::new()).await?;
        self.verify(bucket, key, length, &sha256).await
    }

    async fn put_if(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes: Vec<u8>,
        expected: Expected<'_>,
    ) -> Result<Option<ObjectHead>, StoreError> {
        self.put_expected(bucket, key, bytes, expected).await
    }

    async fn head(&self, bucket: &BucketName, key: &ObjectKey) -> Result<ObjectHead, StoreError> {
        self.look(bucket, key).await.map(|seen| seen.head)
    }

    async fn get_to_file(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        path: &Path,
        expected: Option<&str>,
    ) -> Result<ObjectHead, StoreError> {
        self.download(bucket, key, path, expected).await
    }

    async fn get_versioned(
        &self,
        bucket: &BucketName,
        key: &ObjectKey,
        bytes_max: u64,
    ) -> Result<Versioned, StoreError> {
        self.read(bucket, key, bytes_max).await
    }

    async fn list(&self, bucket: &BucketName, prefix: &str, items_max: usize) -> Result<Listed, StoreError> {
        let mut listed = Listed::default();
        let mut after: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let (items, is_truncated) = self.page(bucket, prefix, after.as_deref()).await?;
            let last = items.last().map(|item| item.name.clone());
            // An object whose name ends so stands for an empty folder, as consoles make them.
            let is_folder = |name: &str| name.ends_with('/');
            for item in items.into_iter().filter(|item| !item.is_prefix && !is_folder(&item.name)) {
                let etag = item.etag.unwrap_or_default().trim_matches('"').to_owned();
                listed.add(item.name, item.size.unwrap_or(0), etag);
            }
            listed.check(bucket, prefix, items_max)?;
            if !is_truncated || last.is_none() || last == after {
                break;
            }
            after = last;
        }
        listed.entries.sort();
        listed.entries.dedup_by(|a, b| a.key == b.key);
        Ok(listed)
    }

    async fn delete(&self, bucket: &BucketName, key: &ObjectKey) -> Result<(), StoreError> {
        let object = format!("{bucket}/{key}");
        let what = format!("delete {object}");
        let deleted = self.attempt(&what, &object, 0, || async {
            self.client.delete_object(bucket.as_str(), key.as_str())?.build().send().await.map(|_| ())
        });
        found(deleted.await).map(|_| ())
    }

    async fn copy(
        &self,
        from: (&BucketName, &ObjectKey),
        to: (&BucketName, &ObjectKey),
    ) -> Result<(), StoreError> {
        let object = format!("{}/{}", from.0, from.1);
        let what = format!("copy {object} to {}/{}", to.0, to.1);
        // The deadline follows the size: a server may read and write it all.
        let bytes = self.look(from.0, from.1).await?.head.bytes;
        self.attempt(&what, &object, bytes, || async {
            // The crate writes the source into a header as it is; there it has to be encoded.
            let source = CopySource::builder()
                .bucket(types::BucketName::new(from.0.as_str())?)
                .object(types::ObjectKey::new(urlencode_object_key(from.1.as_str()))?)
                .build();
            let request = CopyObjectInternal::builder()
                .client(self.client.clone())
                .bucket(types::BucketName::new(to.0.as_str())?)
                .object(types::ObjectKey::new(to.1.as_str())?)
                .source(source);
            request.build().send().await.map(|_| ())
        })
        .await
    }

    fn url(&self, bucket: &BucketName, key: &ObjectKey) -> String {
        let address = || {
            let (bucket, key) =
                (types::BucketName::new(bucket.as_str())?, types::ObjectKey::new(key.as_str())?);
            let none = Multimap::new();
            self.base.build_url(&Method::GET, &self.base.region, &none, Some(&bucket), Some(&key))
        };
        let plain = |_| format!("{}/{bucket}/{key}", self.base.to_url_string());
        address().map_or_else(plain, |url| url.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_keys_are_checked_and_never_shown() {
        let config = |endpoint: &str| StoreConfig {
            endpoint: Some(endpoint.to_owned()),
            id: Some(Secret::new("the-id")),
            secret: Some(Secret::new("the-secret")),
            ..StoreConfig::default()
        };
        let store = MinioStore::new(&config("http://h:9000/")).expect("a store");
        let (bucket, key) =
            (BucketName::new("models").expect("ok"), ObjectKey::new("a b/ä.txt").expect("ok"));
        assert_eq!(store.url(&bucket, &key), "http://h:9000/models/a%20b/%C3%A4.txt");
        let virtual_host = StoreConfig { is_path_style: false, ..config("https://s3.example:9443") };
        let store = MinioStore::new(&virtual_host).expect("a store");
        assert_eq!(store.url(&bucket, &key), "https://models.s3.example:9443/a%20b/%C3%A4.txt");
        let shown = format!("{:?}", store.client);
        assert!(!shown.contains("the-id") && !shown.contains("the-secret"), "{shown}");
        for bad in ["http://u:p@h", "ftp://h", "http://h/path", "http://"] {
            let error = MinioStore::new(&config(bad)).err().map(|error| error.to_string());
            assert!(error.is_some(), "{bad}");
        }
        let half = StoreConfig { secret: None, ..config("http://h") };
        assert!(MinioStore::new(&half).is_err());
        let ca = StoreConfig { ca_file: Some("/no/such/file".into()), ..config("https://h") };
        assert!(MinioStore::new(&ca).is_err());
    }
}
