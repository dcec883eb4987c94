# What s3s-fs 0.14.1 lacks beside S3, changed in its src/s3.rs before it is built (scripts/services.sh). Each change leaves a mark.
# An empty delimiter is none: clients send it to list everything.
s/let delimiter = input\.delimiter\.as_deref();/let delimiter = input.delimiter.as_deref().filter(|text| !text.is_empty()); \/\/ changed/
# It names an encoding of the keys that it does not apply.
s/encoding_type: \(input\|v2\)\.encoding_type,/encoding_type: None, \/\/ changed/
# An object in a bucket that is not there is refused.
/\/\/ Check conditional headers before modifying any state\./i\
        if !self.get_bucket_path(&bucket)?.exists() { return Err(s3_error!(NoSuchBucket)); } // changed
# Lists have the tags of the objects.
/\/\/ Sort before filtering and limiting/i\
        for object in &mut objects { // changed\
            let key = object.key.clone().unwrap_or_default();\
            let info = self.load_internal_info(&input.bucket, &key).await?;\
            let e_tag = match info.as_ref().and_then(crate::checksum::load_e_tag) {\
                Some(e_tag) => e_tag,\
                None => self.get_md5_sum(&input.bucket, &key).await?,\
            };\
            object.e_tag = Some(ETag::Strong(e_tag));\
        }
