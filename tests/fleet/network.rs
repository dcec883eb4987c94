//! A machine in a network of its own, whose cable is cut: on the level of the system, not of a proxy.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use boxwright::job::state::JobState;

use crate::park::{Park, stub_job};
use crate::servers::missing;

/// A network namespace with a cable to this machine; gone with it.
struct Network {
    ip: PathBuf,
    name: String,
    /// This side's end of the cable; the other one is called `far`.
    near: String,
    near_address: Ipv4Addr,
}

impl Network {
    /// Makes one. `None` after a loud word without `ip` or without the right to.
    fn new() -> Option<Self> {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&folders).chain(["/usr/sbin".into(), "/sbin".into()]);
        let Some(ip) = folders.map(|folder| folder.join("ip")).find(|path| path.is_file()) else {
            eprintln!("SKIPPED: there is no `ip`, so no network of one's own");
            return None;
        };
        let pid = std::process::id();
        // Of the range that is set apart for such measurements; 4 addresses each.
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (pid % 0x8000) * 4;
        let near_address = Ipv4Addr::from(base + 1);
        let network = Self { ip, name: format!("boxwright-{pid}"), near: format!("bw{pid}"), near_address };
        network.clear_up_after_the_dead();
        let (name, near) = (&network.name, &network.near);
        for words in [
            format!("netns add {name}"),
            format!("link add {near} type veth peer name far netns {name}"),
            format!("addr add {near_address}/30 dev {near}"),
            format!("link set {near} up"),
            format!("-n {name} addr add {}/30 dev far", Ipv4Addr::from(base + 2)),
            format!("-n {name} link set lo up"),
            format!("-n {name} link set far up"),
        ] {
            let output = network.run(&words);
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                return missing(&format!("right to make networks (`ip {words}`: {})", said.trim()));
            }
        }
        Some(network)
    }

    fn run(&self, words: &str) -> Output {
        Command::new(&self.ip).args(words.split(' ')).output().expect("ip runs")
    }

    fn order(&self, words: &str) {
        let output = self.run(words);
        assert!(output.status.success(), "ip {words}: {output:?}");
    }

    /// Namespaces of test programs that were killed.
    fn clear_up_after_the_dead(&self) {
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(pid) = name.strip_prefix("boxwright-") else { continue };
            if !Path::new("/proc").join(pid).exists() {
                self.run(&format!("netns del {name}"));
                self.run(&format!("link del bw{pid}"));
            }
        }
    }

    /// From now on nothing that the far side sends arrives, and it is not told: its packets go to nobody's address. What is
    /// sent to it arrives.
    fn swallow(&self) {
        let (name, near) = (&self.name, self.near_address);
        self.order(&format!("-n {name} neigh replace {near} lladdr 02:00:00:00:00:09 dev far nud permanent"));
    }

    fn heal_swallowing(&self) {
        let (name, near) = (&self.name, self.near_address);
        self.order(&format!("-n {name} neigh del {near} dev far"));
    }

    /// The cable is out on the far side: no way anywhere, and every call says so at once.
    fn unplug(&self) {
        self.order(&format!("-n {} link set far down", self.name));
    }

    fn plug_in(&self) {
        self.order(&format!("-n {} link set far up", self.name));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The cable goes with either end.
        self.run(&format!("link del {}", self.near));
        self.run(&format!("netns del {}", self.name));
    }
}

#[test]
fn a_machine_whose_cable_is_cut_loses_its_job_to_another_and_leaves_it_alone_afterwards() {
    // First, so that it goes last: after the machines in it.
    let Some(network) = Network::new() else { return };
    let Some(park) = Park::at(network.near_address) else { return };
    let url = format!("redis://{}:{}/0", network.near_address, park.redis.port());
    let (mut cut, mut other) = (park.machine_at("cut", &url), park.machine("other"));
    let ip = network.ip.to_string_lossy().into_owned();
    cut.launch_by(&[&ip, "netns", "exec", &network.name]);
    cut.start();
    cut.wait_log("takes jobs from");
    type Act = fn(&Network);
    let faults: [(&str, Act, Act); 2] = [
        ("swallowed", Network::swallow, Network::heal_swallowing),
        ("unplugged", Network::unplug, Network::plug_in),
    ];
    for (task_id, harm, heal) in faults {
        park.push(&[("config", &stub_job(task_id, "steps=300,pause=0.05"))]);
        cut.wait_steps(task_id, 5);
        if other.logs().is_empty() {
            other.start();
        } else {
            assert!(other.run(&["undrain"]).status.success());
        }
        other.wait_log("takes jobs from");
        harm(&network);
        other.wait_steps(task_id, 1);
        // The one that is cut off cannot know, and goes on.
        let before = cut.stub(task_id, "steps").lines().count();
        cut.wait_steps(task_id, before + 3);
        assert_eq!(cut.record(task_id).map(|record| record.state), Some(JobState::Running));
        heal(&network);
        cut.wait_state(task_id, JobState::Moved);
        let stopped_at = cut.stub(task_id, "steps").lines().count();
        // What the one has to do next must not be taken by the other.
        assert!(other.run(&["drain"]).status.success());
        let result = park.wait_result(&other, task_id);
        let told = (result["status"].as_str(), result["machine_id"].as_str(), result["attempt"].as_i64());
        assert_eq!(told, (Some("completed"), Some("other"), Some(2)), "{task_id}");
        assert_eq!(cut.stub(task_id, "steps").lines().count(), stopped_at, "its trainer is gone");
        for world in [&cut, &other] {
            world.assert_no_violation(task_id);
        }
    }
    cut.wait("an empty queue", || (park.queue_length() == 0).then_some(()));
    assert_eq!(park.results().len(), 2, "one result for each");
    for world in [&mut cut, &mut other] {
        world.end_service(libc::SIGTERM);
    }
}
