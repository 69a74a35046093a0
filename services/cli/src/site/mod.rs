//! The site itself: its folder, its processes, what it makes on the machine.

pub(crate) mod broker;
pub(crate) mod create;
pub(crate) mod doctor;
pub(crate) mod keys;
pub(crate) mod ledger;
pub(crate) mod leftovers;
pub(crate) mod logs;
pub(crate) mod network;
pub(crate) mod pki;
pub(crate) mod process;
pub(crate) mod programs;
#[cfg(test)]
mod rights;
pub(crate) mod stop;
pub(crate) mod supervisor;

use kiln_service::config::Site;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;

pub(crate) fn load(home: &Home) -> Outcome<Site> {
    if let Err(error) = home.folder().metadata()
        && error.kind() == std::io::ErrorKind::PermissionDenied
    {
        return Err(error).during(format_args!("looking for the site in {}", home.folder().display()));
    }
    if !home.exists() {
        return Err(Failure::new(
            Code::Unavailable,
            format!("there is no site in {}", home.folder().display()),
            "",
        )
        .reason("no_site")
        .todo("`kiln up` makes one and starts it; --home and --site name another"));
    }
    Site::load(home.folder())
        .map_err(|error| Failure::new(Code::Invalid, "the site's settings", error).reason("bad_config"))
}

/// Instances, their network and the edge need root; what would fail half-way is refused at once.
pub(crate) fn require_root(what: &str) -> Outcome {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(Code::Refused, what, "instances and their network are made by root")
        .reason("not_root")
        .todo("run it as root: sudo kiln …"))
}
