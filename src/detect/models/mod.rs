//! Detector networks, built with the graph builder.
