//! The deployer's process.

use std::process::ExitCode;

use kiln_model::event::Service;

fn main() -> ExitCode {
    kiln_service::run::main(Service::Deployer, kiln_deployer::run)
}
