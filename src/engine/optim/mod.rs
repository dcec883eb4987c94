//! Optimisers over flat parameter buffers.
