//! What a job is: its specification, the messages that bring it, the service it runs in, its slots, its states, its
//! events, its record in the journal.
//!
//! Nothing here touches a database, a process or an actor. Start reading at [`spec::JobSpec`] and [`state::JobState`].

pub mod causes;
pub mod clock;
pub mod delivery;
pub mod event;
pub mod ids;
pub mod message;
pub mod record;
pub mod secret;
pub mod service;
pub mod slot;
pub mod spec;
pub mod state;
