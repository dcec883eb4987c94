//! The tracking adapter against a real MLflow server, directly and through a proxy that does what networks do.

mod artifacts;
mod couriers;
mod faults;
mod life;
mod machines;
mod outages;
mod proxy;
mod registry;
#[path = "../common/servers/mlflow.rs"]
mod server;
mod world;
