//! Interrupt and termination, as a flag that is polled.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::SeqCst);
}

/// From now on the first interrupt or termination only sets the flag; a second one ends the process.
pub fn watch() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: `action` is a whole `sigaction` (zeroed, then filled); the handler only stores to an
        // atomic, which is allowed in a signal handler; SA_RESETHAND restores the default for the second.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// True once the process was asked to end.
pub fn asked_to_end() -> bool {
    ASKED.load(Ordering::SeqCst)
}
