//! What can go wrong in the engine that a user can cause or act on. Programmer errors are assertions.

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A named parameter does not exist.
    #[error("the network has no parameter {name:?}")]
    UnknownParameter {
        /// The name that was asked for.
        name: String,
    },
    /// A tensor does not have the shape that the parameter needs.
    #[error("parameter {name:?}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The parameter.
        name: String,
        /// Shape of the parameter.
        expected: Vec<usize>,
        /// Shape that was given.
        got: Vec<usize>,
    },
    /// The memory for a plan could not be had.
    #[error("the plan needs {needed_bytes} bytes of memory and the system refused them")]
    OutOfMemory {
        /// Bytes that were asked for.
        needed_bytes: usize,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// Number of threads asked for.
        threads: usize,
        /// Why.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}
