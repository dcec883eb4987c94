//! Leases: who works on a task, with a fencing number that tells a later owner from an earlier one.

use redis::cmd;

use super::{Fleet, FleetError, scripts};
use crate::job::ids::TaskId;

/// How long a fencing number is remembered after its last use, in milliseconds: 7 days.
const FENCE_TTL_MS: &str = "604800000";

/// What became of a request for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// It is ours.
    Mine {
        /// Greater than every number given out for the task before.
        fence: u64,
        /// Attempts that earlier owners of the same instance reported.
        attempts_before: u32,
    },
    /// Another machine has it.
    Held {
        /// The machine.
        owner: String,
        /// Its number.
        fence: u64,
    },
}

/// What became of the prolongation of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewed {
    /// It is still ours.
    Mine,
    /// It was given to another machine, or to a later start of this one.
    Lost {
        /// The machine.
        owner: String,
        /// Its number.
        fence: u64,
    },
}

impl Fleet {
    /// Takes the lease of a task for `ttl_ms`, if it is free or was this machine's before (which then has restarted).
    ///
    /// # Errors
    /// As every call.
    pub async fn acquire(
        &self,
        task_id: &TaskId,
        instance: &str,
        ttl_ms: u64,
    ) -> Result<Acquired, FleetError> {
        let (lease, fence) = (self.keys().lease(task_id.as_str()), self.keys().fence(task_id.as_str()));
        let ttl = ttl_ms.to_string();
        let arguments: [&[u8]; 5] = [
            self.inner.machine_id.as_bytes(),
            self.inner.incarnation.as_bytes(),
            instance.as_bytes(),
            ttl.as_bytes(),
            FENCE_TTL_MS.as_bytes(),
        ];
        let (is_mine, owner, fence, attempts): (bool, String, u64, u32) =
            self.script("take a lease", &scripts::ACQUIRE, &[&lease, &fence], &arguments).await?;
        Ok(match is_mine {
            true => Acquired::Mine { fence, attempts_before: attempts },
            false => Acquired::Held { owner, fence },
        })
    }

    /// Prolongs a lease by `ttl_ms` from now and notes the attempts so far. A lease that is gone is taken again with the same
    /// number, unless a higher one was given out.
    ///
    /// # Errors
    /// As every call.
    pub async fn renew(
        &self,
        task_id: &TaskId,
        instance: &str,
        fence: u64,
        attempts: u32,
        ttl_ms: u64,
    ) -> Result<Renewed, FleetError> {
        let keys = [self.keys().lease(task_id.as_str()), self.keys().fence(task_id.as_str())];
        let (ttl, fence, attempts) = (ttl_ms.to_string(), fence.to_string(), attempts.to_string());
        let arguments: [&[u8]; 7] = [
            self.inner.machine_id.as_bytes(),
            self.inner.incarnation.as_bytes(),
            instance.as_bytes(),
            ttl.as_bytes(),
            FENCE_TTL_MS.as_bytes(),
            fence.as_bytes(),
            attempts.as_bytes(),
        ];
        let (is_mine, owner, fence): (bool, String, u64) =
            self.script("renew a lease", &scripts::RENEW, &[&keys[0], &keys[1]], &arguments).await?;
        Ok(if is_mine { Renewed::Mine } else { Renewed::Lost { owner, fence } })
    }

    /// Gives a lease up, if it still has this number. False when it has not.
    ///
    /// # Errors
    /// As every call.
    pub async fn let_go(&self, task_id: &TaskId, fence: u64) -> Result<bool, FleetError> {
        let (lease, fence) = (self.keys().lease(task_id.as_str()), fence.to_string());
        let arguments: [&[u8]; 2] = [b"fence", fence.as_bytes()];
        self.script("give a lease up", &scripts::FORGET_IF, &[&lease], &arguments).await
    }

    /// Forgets which instance of a task had its lease last; its number stays.
    ///
    /// # Errors
    /// As every call.
    pub async fn forget_instance(&self, task_id: &TaskId) -> Result<(), FleetError> {
        let mut command = cmd("HDEL");
        command.arg(self.keys().fence(task_id.as_str())).arg("instance").arg("attempts");
        self.command("forget an instance", &command).await
    }

    /// Who has the lease of a task, and its number.
    ///
    /// # Errors
    /// As every call.
    pub async fn holder(&self, task_id: &TaskId) -> Result<Option<(String, u64)>, FleetError> {
        let mut command = cmd("HMGET");
        command.arg(self.keys().lease(task_id.as_str())).arg("owner").arg("fence");
        let (owner, fence): (Option<String>, Option<u64>) = self.command("read a lease", &command).await?;
        Ok(owner.zip(fence))
    }

    /// The instance of a task whose lease was given out last, also when the lease is over.
    ///
    /// # Errors
    /// As every call.
    pub async fn last_instance(&self, task_id: &TaskId) -> Result<Option<String>, FleetError> {
        let mut command = cmd("HGET");
        command.arg(self.keys().fence(task_id.as_str())).arg("instance");
        self.command("read a lease", &command).await
    }
}
