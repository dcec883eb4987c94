//! docker-compose.yaml, Dockerfile and the files that they mount: nobody is root or privileged, every image has a tag,
//! every server a health check, every variable a reader, every path a file.

use std::collections::BTreeSet;

use serde_yaml::Value;

use super::none;
use super::source::{files, read, root};

/// The one that prepares volumes and ends.
const ONE_SHOT: &str = "prepare";
/// Variables that others than the program read: the C library, the filter of the logs, and NVIDIA's container runtime.
const READ_BY_OTHERS: [&str; 4] = ["TZ", "RUST_LOG", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"];

fn compose() -> Value {
    let text = read(&root().join("docker-compose.yaml"));
    let mut value: Value = serde_yaml::from_str(&text).expect("docker-compose.yaml is YAML");
    // Once for the merges, and once for those in what they brought.
    for _ in 0..2 {
        value.apply_merge().expect("its merges are mappings");
    }
    value
}

/// Name and content of each service.
fn services(compose: &Value) -> Vec<(String, Value)> {
    let services = compose["services"].as_mapping().expect("there are services");
    let entry =
        |(name, service): (&Value, &Value)| (name.as_str().expect("a name").to_owned(), service.clone());
    services.iter().map(entry).collect()
}

fn is_worker(name: &str) -> bool {
    name.starts_with("worker")
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_sequence().cloned().unwrap_or_default();
    list.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

/// `${NAME:-default}` becomes its default.
fn filled(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (inside, behind) = after.split_once('}').expect("a variable ends");
        out.push_str(before);
        out.push_str(inside.split_once(":-").map_or("", |(_, default)| default));
        rest = behind;
    }
    out + rest
}

/// Names of the variables of an env file; those in comments too, where the line is a setting switched off.
fn variables(text: &str) -> Vec<String> {
    let settings = text.lines().map(|line| line.strip_prefix('#').unwrap_or(line));
    let names = settings.filter_map(|line| line.split_once('=')).map(|(name, _)| name.to_owned());
    names
        .filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
        .collect()
}

/// Names that the program looks up: every text in capitals in its source.
fn read_by_the_program() -> BTreeSet<String> {
    let is_name = |text: &str| {
        text.len() > 1 && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    let sources = files("src", &[".rs"]).iter().map(|path| read(path)).collect::<Vec<_>>();
    sources.iter().flat_map(|text| text.split('"')).filter(|text| is_name(text)).map(str::to_owned).collect()
}

fn unread<'a>(names: impl IntoIterator<Item = &'a String>, place: &str) -> Vec<String> {
    let known = read_by_the_program();
    let is_known = |name: &str| {
        let of_file = name.strip_suffix("_FILE").is_some_and(|secret| known.contains(secret));
        known.contains(name) || of_file || READ_BY_OTHERS.contains(&name)
    };
    let strange = names.into_iter().filter(|name| !is_known(name));
    strange.map(|name| format!("{place}: nothing reads {name}")).collect()
}

#[test]
fn no_container_is_privileged_or_root() {
    let mut breaches = Vec::new();
    for (name, service) in services(&compose()) {
        let mut need = |holds: bool, what: &str| {
            if !holds {
                breaches.push(format!("docker-compose.yaml: {name} {what}"));
            }
        };
        for key in ["privileged", "pid", "ipc", "userns_mode", "container_name", "devices"] {
            need(service.get(key).is_none(), &format!("has `{key}`"));
        }
        need(service["network_mode"].as_str() != Some("host"), "is on the host's network");
        need(texts(&service["cap_drop"]) == ["ALL"], "does not drop all capabilities");
        need(service["read_only"].as_bool() == Some(true), "has a root that can be written to");
        let options = texts(&service["security_opt"]);
        need(options.iter().any(|option| option == "no-new-privileges:true"), "may gain privileges");
        let user = filled(service["user"].as_str().unwrap_or("0"));
        let is_root = user == "root" || user.split(':').any(|part| part == "0" || part == "root");
        let added = texts(&service["cap_add"]);
        if name == ONE_SHOT {
            need(added == ["CHOWN"], "has more than the one capability that it is for");
            need(service["network_mode"].as_str() == Some("none"), "is on a network");
        } else {
            need(!is_root, "is root");
            need(added.is_empty(), "adds capabilities");
        }
        let sources = service["volumes"].as_sequence().cloned().unwrap_or_default();
        let is_socket = |volume: &Value| volume.as_str().is_some_and(|text| text.contains("docker.sock"));
        need(!sources.iter().any(is_socket), "has the engine's socket");
    }
    none(breaches);
}

#[test]
fn every_server_has_a_health_check_and_every_image_a_tag() {
    let compose = compose();
    let mut breaches = Vec::new();
    let stages = read(&root().join("Dockerfile"));
    for (name, service) in services(&compose) {
        let image = service["image"].as_str().unwrap_or_default();
        let tag = image.rsplit('/').next().and_then(|last| last.split_once(':')).map(|(_, tag)| tag);
        if tag.is_none_or(|tag| tag.is_empty() || tag == "latest") {
            breaches.push(format!("docker-compose.yaml: {name}: the image {image:?} has no tag"));
        }
        let test = texts(&service["healthcheck"]["test"]);
        if name != ONE_SHOT && test.first().is_none_or(|kind| !kind.starts_with("CMD")) {
            breaches.push(format!("docker-compose.yaml: {name} has no health check"));
        }
        if let Some(target) = service["build"]["target"].as_str()
            && !stages
                .lines()
                .any(|line| line.starts_with("FROM ") && line.ends_with(&format!(" AS {target}")))
        {
            breaches.push(format!("docker-compose.yaml: {name}: Dockerfile has no target {target}"));
        }
        // Replicas would fight for them.
        if is_worker(&name) && service.get("ports").is_some() {
            breaches.push(format!("docker-compose.yaml: {name} has a port of the host"));
        }
    }
    let mut names = BTreeSet::new();
    for line in stages.lines().filter_map(|line| line.strip_prefix("FROM ")) {
        let (image, name) = line.split_once(" AS ").unwrap_or((line, ""));
        if !names.contains(image) && image.split_once(':').is_none_or(|(_, tag)| tag == "latest") {
            breaches.push(format!("Dockerfile: the image {image:?} has no tag"));
        }
        names.insert(name);
    }
    none(breaches);
}

#[test]
fn workers_get_only_variables_that_are_read() {
    let mut breaches = Vec::new();
    let mut paths = BTreeSet::new();
    for (name, service) in services(&compose()).iter().filter(|(name, _)| is_worker(name)) {
        let environment = service["environment"].as_mapping().expect("a mapping");
        let names: Vec<String> =
            environment.keys().filter_map(|key| key.as_str().map(str::to_owned)).collect();
        breaches.extend(unread(&names, &format!("docker-compose.yaml: {name}")));
        for entry in service["env_file"].as_sequence().expect("a list") {
            let path = entry["path"].as_str().expect("a path");
            // The user's own files have examples.
            let is_optional = entry["required"].as_bool() == Some(false);
            paths.insert(if is_optional {
                format!("configs/compose/{path}.example")
            } else {
                path.to_owned()
            });
        }
    }
    assert_eq!(paths.len(), 3, "{paths:?}");
    for path in &paths {
        let text = read(&root().join(path));
        breaches.extend(unread(&variables(&text), path));
    }
    let dockerfile = read(&root().join("Dockerfile"));
    let settings =
        dockerfile.lines().map(|line| line.trim_start_matches("ENV ").trim_end_matches(" \\").trim());
    breaches.extend(unread(&variables(&settings.collect::<Vec<_>>().join("\n")), "Dockerfile"));
    none(breaches);
}

#[test]
fn every_secret_and_mounted_file_is_there() {
    let compose = compose();
    let mut breaches = Vec::new();
    let script = read(&root().join("scripts/compose-secrets.sh"));
    let secrets = compose["secrets"].as_mapping().expect("there are secrets");
    for (name, secret) in secrets {
        let (name, file) = (name.as_str().unwrap_or_default(), secret["file"].as_str().unwrap_or_default());
        if file != format!("./secrets/{name}") || !script.contains(name) {
            breaches.push(format!("docker-compose.yaml: scripts/compose-secrets.sh does not make {file}"));
        }
    }
    let named = compose["volumes"].as_mapping().expect("there are volumes");
    for (name, service) in services(&compose) {
        for volume in texts(&service["volumes"]) {
            let volume = filled(&volume);
            let source = volume.split(':').next().unwrap_or_default();
            let is_file =
                source.rsplit('/').next().is_some_and(|last| last.contains('.')) && source.len() > 1;
            if !source.starts_with('.') && !named.contains_key(source) {
                breaches.push(format!("docker-compose.yaml: {name}: no volume {source}"));
            } else if source.starts_with('.') && is_file && !root().join(source).is_file() {
                breaches.push(format!("docker-compose.yaml: {name}: no file {source}"));
            }
        }
        for secret in texts(&service["secrets"]) {
            if !secrets.contains_key(secret.as_str()) {
                breaches.push(format!("docker-compose.yaml: {name}: no secret {secret}"));
            }
        }
    }
    for line in read(&root().join("Dockerfile")).lines().filter(|line| line.starts_with("COPY ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_ours = !line.contains("--from=");
        if is_ours && words.len() == 3 && !root().join(words[1]).exists() {
            breaches.push(format!("Dockerfile: {line}: no such file"));
        }
    }
    none(breaches);
}

#[test]
fn the_script_makes_folders_of_the_user_and_secrets_that_can_be_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("scripts")).expect("created");
    std::fs::copy(root().join("scripts/compose-secrets.sh"), at("scripts/make.sh")).expect("copied");
    let mode = |name: &str| std::fs::metadata(at(name)).expect("it is there").permissions().mode() & 0o777;
    for round in ["new", "mine"] {
        let done = std::process::Command::new("bash").arg(at("scripts/make.sh")).output().expect("bash");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(at("config_versions").is_dir() && at("config").is_dir());
        assert_eq!((mode("secrets"), mode("secrets/store_id")), (0o700, 0o644), "{round}");
        let text = std::fs::read_to_string(at("secrets/store_id")).expect("readable");
        assert!(if round == "new" { text.len() == 24 } else { text == "mine" }, "{text}");
        std::fs::write(at("secrets/store_id"), "mine").expect("writable");
        std::fs::set_permissions(at("secrets/store_id"), PermissionsExt::from_mode(0o444)).expect("changed");
    }
}

#[test]
fn the_queue_is_written_to_disk_and_never_evicted() {
    let text = read(&root().join("configs/compose/redis.conf"));
    for line in ["appendonly yes", "maxmemory-policy noeviction"] {
        assert!(text.lines().any(|found| found == line), "configs/compose/redis.conf: {line}");
    }
}

#[test]
fn variables_and_defaults_are_found() {
    assert_eq!(filled("${A:-1}:${B}/c"), "1:/c");
    assert_eq!(variables("# words = x\nA=1\n#B_2=\n"), ["A", "B_2"]);
    assert_eq!(
        unread(&["CONFIGS_DIR".to_owned(), "REDIS_PASSWORD_FILE".to_owned()], "x"),
        Vec::<String>::new()
    );
    assert_eq!(unread(&["NO_SUCH_THING".to_owned()], "x"), ["x: nothing reads NO_SUCH_THING"]);
}
