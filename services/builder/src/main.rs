use std::process::ExitCode;

fn main() -> ExitCode {
    kiln_service::run::main(kiln_model::event::Service::Builder, kiln_builder::run)
}
