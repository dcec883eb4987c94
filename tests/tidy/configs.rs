//! Every file in `configs/` parses as what it is: `service/` holds the service's configuration, `compose/` files of
//! docker-compose.yaml (which have tests of their own), everything else is a job.

use std::path::Path;

use boxwright::job::service::ServiceConfig;
use boxwright::job::spec::{JobSpec, SpecContext};

use super::none;
use super::source::{files, read, root, shown};

fn job_fault(path: &Path) -> Option<String> {
    let context = SpecContext {
        base: None,
        // A shipped example has no key that does nothing.
        strict: true,
        runs_dir: "runs".into(),
        working_dir: root().to_path_buf(),
        data_path_map: Vec::new(),
    };
    let loaded = JobSpec::load(read(path).as_bytes(), &shown(path), &context);
    loaded.and_then(|l| l.runnable()).err().map(|e| e.to_string())
}

fn service_fault(path: &Path) -> Option<String> {
    ServiceConfig::load(Some(path), |_| None).err().map(|e| e.to_string())
}

#[test]
fn every_file_in_configs_parses_as_what_it_is() {
    let all = files("configs", &[""]);
    assert!(all.len() >= 2, "configs/ holds a job and the service's configuration");
    let service = root().join("configs/service");
    let mut breaches = Vec::new();
    let mut jobs = 0;
    let compose = root().join("configs/compose");
    for path in all.iter().filter(|path| !path.starts_with(&compose)) {
        let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
        let fault = if path.starts_with(&service) {
            service_fault(path)
        } else if yaml {
            jobs += 1;
            job_fault(path)
        } else {
            // Words for people are allowed beside the files for the program.
            path.extension().is_none_or(|e| e != "md").then(|| "neither YAML nor a page".to_string())
        };
        breaches.extend(fault.map(|f| format!("{}: {f}", shown(path))));
    }
    assert!(jobs > 0, "configs/ holds an example job");
    none(breaches);
}
