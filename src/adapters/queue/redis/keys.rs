//! The names of all keys.

use crate::job::service::RedisConfig;

/// Names of keys. Their table is in `docs/redis-keys.md`.
///
/// Some keys are used by one script together with another key. On a cluster they must lie in the slot of that key, so
/// there they are `{key}:suffix` in place of `key:suffix`: the part in braces decides, and it is the other key's name.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub(super) topic: String,
    pub(super) high: String,
    pub(super) low: String,
    pub(super) routed: String,
    dead: String,
    pub(super) results: String,
    is_cluster: bool,
}

/// The lists of resumed and of evaluated jobs.
pub(super) const SIDE_LISTS: [&str; 2] = ["recreate", "evaluate"];
pub(super) const MACHINES: &str = "machines";
pub(super) const QUEUE_STATS: &str = "queue:stats";
pub(super) const PROGRESS_CHANNEL: &str = "progress:updates";
pub(super) const CANCELLATIONS: &str = "ai:job:cancellations";

impl Keys {
    pub(super) fn new(config: &RedisConfig, is_cluster: bool) -> Self {
        let topic = config.topic.clone();
        let beside = |suffix| beside(&topic, suffix, is_cluster);
        Self {
            high: beside("high"),
            low: beside("low"),
            routed: beside("routed"),
            dead: beside("dead"),
            results: config.result_topic.clone(),
            topic,
            is_cluster,
        }
    }

    /// The three streams, most urgent first.
    pub(super) fn streams(&self) -> [&str; 3] {
        [&self.high, &self.topic, &self.low]
    }

    /// What a machine has taken from a list.
    pub(super) fn processing(&self, list: &str, machine: &str) -> String {
        beside(list, &format!("processing:{machine}"), self.is_cluster)
    }

    /// Where what cannot be worked on goes, from a stream of the topic or from a list.
    pub(super) fn dead_of(&self, queue: &str) -> String {
        if self.is_cluster && SIDE_LISTS.contains(&queue) {
            beside(queue, "dead", true)
        } else {
            self.dead.clone()
        }
    }

    /// The mark that the result of this instance of a task was published.
    pub(super) fn seen(&self, instance: &str) -> String {
        // Braces always, so that a change to a cluster changes no name.
        beside(&self.results, &format!("seen:{instance}"), true)
    }

    pub(super) fn lease(&self, task_id: &str) -> String {
        format!("lease:{task_id}")
    }

    pub(super) fn fence(&self, task_id: &str) -> String {
        if self.is_cluster { beside(&self.lease(task_id), "fence", true) } else { format!("fence:{task_id}") }
    }

    pub(super) fn log(&self, task_id: &str) -> String {
        format!("stream:{task_id}")
    }

    pub(super) fn log_offset(&self, task_id: &str) -> String {
        beside(&self.log(task_id), "offset", self.is_cluster)
    }

    pub(super) fn progress(&self, task_id: &str) -> String {
        format!("progress:{task_id}")
    }

    pub(super) fn metrics(&self, task_id: &str) -> String {
        format!("metrics:{task_id}")
    }

    /// The run that the metrics of a task are of.
    pub(super) fn metrics_run(&self, task_id: &str) -> String {
        beside(&self.metrics(task_id), "run", self.is_cluster)
    }

    pub(super) fn machine(&self, machine: &str) -> String {
        format!("machine:{machine}")
    }

    pub(super) fn worker(&self, machine: &str, slot: &str) -> String {
        format!("worker:{machine}:{slot}")
    }

    pub(super) fn gpu(&self, uuid: &str) -> String {
        format!("gpu:{uuid}")
    }

    /// Keys whose existence cancels a task.
    pub(super) fn cancels(&self, task_id: &str) -> [String; 2] {
        [format!("study:{task_id}:cancel"), format!("cancel:{task_id}")]
    }
}

/// A key beside `base`; in the same slot of a cluster when `is_tagged`. A base with braces of its own keeps its slot.
fn beside(base: &str, suffix: &str, is_tagged: bool) -> String {
    if is_tagged && !base.contains('{') { format!("{{{base}}}:{suffix}") } else { format!("{base}:{suffix}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_lie_in_the_slot_of_their_key_on_a_cluster() {
        let config = RedisConfig::default();
        let keys = Keys::new(&config, false);
        assert_eq!(keys.streams(), ["training_queue:high", "training_queue", "training_queue:low"]);
        assert_eq!(keys.processing("recreate", "m"), "recreate:processing:m");
        assert_eq!(keys.seen("i"), "{results_queue}:seen:i");
        assert_eq!((keys.fence("t"), keys.log_offset("t")), ("fence:t".into(), "stream:t:offset".into()));
        let keys = Keys::new(&config, true);
        assert_eq!(
            (keys.dead_of("training_queue").as_str(), keys.topic.as_str()),
            ("{training_queue}:dead", "training_queue")
        );
        assert_eq!((keys.fence("t"), keys.lease("t")), ("{lease:t}:fence".into(), "lease:t".into()));
        let config = RedisConfig { topic: "{a}:q".into(), ..config };
        assert_eq!(Keys::new(&config, true).high, "{a}:q:high");
    }
}
