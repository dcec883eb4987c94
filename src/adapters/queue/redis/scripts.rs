//! The scripts that run inside the server, each in a file of its own.

use std::sync::LazyLock;

use redis::Script;

macro_rules! scripts {
    ($($name:ident = $file:literal;)*) => {
        $(pub(super) static $name: LazyLock<Script> = LazyLock::new(|| {
            Script::new(concat!(include_str!("scripts/shared.lua"), include_str!(concat!("scripts/", $file))))
        });)*
    };
}

scripts! {
    ACKNOWLEDGE = "acknowledge.lua";
    ACQUIRE = "acquire.lua";
    ANNOUNCE = "announce.lua";
    BURY = "bury.lua";
    END_LOG = "end_log.lua";
    FORGET_IF = "forget_if.lua";
    GIVE = "give.lua";
    HOLD_ELEMENT = "hold_element.lua";
    LOG = "log.lua";
    METRICS = "metrics.lua";
    MOVE_ELEMENT = "move_element.lua";
    OWN_GPU = "own_gpu.lua";
    OWN_PENDING = "own_pending.lua";
    PROGRESS = "progress.lua";
    PUBLISH = "publish.lua";
    RENEW = "renew.lua";
    RENEW_ENTRIES = "renew_entries.lua";
    RETURN_ELEMENT = "return_element.lua";
    STEAL = "steal.lua";
    TAKE = "take.lua";
}
