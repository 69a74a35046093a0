//! Checks of one instance: from the machine over its network, or inside it.

mod inside;

use std::time::{Duration, Instant};

use kiln_model::check::{Check, CheckResult, CommandCheck};
use kiln_model::name::InstanceId;
use kiln_probe::{CommandSeen, Verdict};
use kiln_service::error::ApiError;
use kiln_store::Store;

use crate::failure::Failure;
use crate::node::{Node, blocking};

impl<S: Store> Node<S> {
    pub(crate) async fn check(
        &self,
        id: &InstanceId,
        check: Check,
        limit: Duration,
    ) -> Result<CheckResult, ApiError> {
        let started = Instant::now();
        let held = self.book.get(id).ok_or_else(|| ApiError::not_found("instance", id.to_string()))?;
        let record = held.value;
        let (Some(process), Some(plug)) = (record.process(), &record.plug) else {
            return Ok(Verdict::failed(format!("the instance is {}", record.state.word())).since(started));
        };
        let process = process.clone();
        let log = self.names.log_file(&id.to_string());
        let seen = match check {
            Check::Http(_) | Check::Tcp(_) => {
                return Ok(kiln_probe::probe(plug.address.into(), &check, limit).await);
            }
            Check::Command(check) => self.run(id, &check, limit).await,
            Check::File(check) => blocking(move || inside::file(&process, &check)).await?,
            Check::Package(check) => blocking(move || inside::package(&process, &check)).await?,
            Check::User(check) => blocking(move || inside::user(&process, &check)).await?,
            Check::Port(check) => blocking(move || inside::port(&process, &check)).await?,
            Check::Process(check) => blocking(move || inside::process(&process, &check)).await?,
            Check::Log(check) => blocking(move || inside::log(&log, &check)).await?,
        };
        let verdict = seen.unwrap_or_else(|failure| Verdict::failed(failure.to_string()));
        Ok(verdict.since(started))
    }

    async fn run(&self, id: &InstanceId, check: &CommandCheck, limit: Duration) -> Result<Verdict, Failure> {
        let ran = self.runtime.exec(&id.to_string(), &check.run, limit).await?;
        let seen = CommandSeen { status: ran.status, stdout: &ran.stdout, stderr: &ran.stderr };
        Ok(kiln_probe::command(check, seen))
    }
}
