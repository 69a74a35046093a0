//! One file for each command.

mod apply;
mod audit;
mod backup;
mod build;
mod completions;
mod diff;
mod doctor;
mod down;
mod events;
mod gc;
mod history;
mod image;
mod init;
mod instances;
mod lint;
mod login;
mod logs;
mod pki;
mod plan;
mod remove;
mod rollback;
mod signal;
mod status;
mod supervise;
mod token;
mod up;
mod why;

use clap::Subcommand;

use crate::clients::Services;
use crate::failure::Outcome;
use crate::home::Home;
use crate::screen::Screen;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start Kiln on this machine; makes the site where there is none
    Up(up::Up),
    /// Stop Kiln and take down everything that it made on this machine
    Down(down::Down),
    /// Look whether this machine can run instances, and say what to do where it can't
    Doctor,
    /// Write a definition to begin with
    Init(init::Init),
    /// Check the definitions of a folder
    Lint(lint::Lint),
    /// Take over the definitions of a folder or of a Git repository, and deploy them
    Apply(apply::Apply),
    /// Give a server up: its fleet is retired
    Remove(remove::Remove),
    /// Show what a build would change, without building
    Plan(plan::Plan),
    /// Resolve a server anew, and build if something differs
    Build(build::Build),
    /// Show the servers, or one of them in full
    Status(status::Status),
    /// Show the instances
    Instances(instances::Instances),
    /// Show what an instance, or each of a server's, wrote
    Logs(logs::Logs),
    /// Go back to the last good release, or to the one named
    Rollback(rollback::Rollback),
    /// Report that a server needs an update; list and approve what was reported
    Signal(signal::Signal),
    /// Show events as they happen
    Events(events::Events),
    /// Show what happened to a server
    History(history::History),
    /// Show the causes behind a server, a build, a release or an instance
    Why(why::Why),
    /// Show who did what, and check that nobody changed the records
    Audit(audit::Audit),
    /// Write a site's state, keys and needed images to one file, while it runs
    Backup(backup::Backup),
    /// Make a site out of a backup, in an empty folder
    Restore(backup::Restore),
    /// Look into images, and export them
    Image(image::Image),
    /// Show where two images differ: packages, configuration, files
    Diff(diff::Diff),
    /// Remove what nobody needs now, instead of within the hour: images, packages, layers
    Gc(gc::Gc),
    /// Make and renew the certificates by which services and people know each other
    Pki(pki::Pki),
    /// Make and revoke the tokens of people
    Token(token::Token),
    /// Keep who you are and where a site on other machines is
    Login(login::Login),
    /// Write the completions for a shell
    Completions(completions::Completions),
    /// Keep certificates fresh and the broker's streams as they must be, where systemd or another keeps the services running
    Tend,
    /// Keep the site's services running (`kiln up` starts it)
    #[command(hide = true)]
    Supervise,
}

pub(crate) async fn run(command: Command, home: &Home, screen: Screen) -> Outcome {
    let services = || Services::open(home);
    match command {
        Command::Up(it) => up::run(it, home, screen).await,
        Command::Down(it) => down::run(&it, home, screen).await,
        Command::Doctor => doctor::run(home, screen).await,
        Command::Init(it) => init::run(&it, screen),
        Command::Lint(it) => lint::run(&it, screen),
        Command::Apply(it) => apply::run(&it, &services()?, screen).await,
        Command::Remove(it) => remove::run(&it, &services()?, screen).await,
        Command::Plan(it) => plan::run(&it, &services()?, screen).await,
        Command::Build(it) => build::run(&it, &services()?, screen).await,
        Command::Status(it) => status::run(&it, &services()?, screen).await,
        Command::Instances(it) => instances::run(&it, &services()?, screen).await,
        Command::Logs(it) => logs::run(&it, &services()?, screen).await,
        Command::Rollback(it) => rollback::run(&it, &services()?, screen).await,
        Command::Signal(it) => signal::run(&it, &services()?, screen).await,
        Command::Events(it) => events::run(&it, &services()?, screen).await,
        Command::History(it) => history::run(&it, &services()?, screen).await,
        Command::Why(it) => why::run(&it, &services()?, screen).await,
        Command::Audit(it) => audit::run(&it, &services()?, screen).await,
        Command::Backup(it) => backup::run(&it, home, screen).await,
        Command::Restore(it) => backup::restore(&it, home, screen).await,
        Command::Image(it) => image::run(&it, &services()?, screen).await,
        Command::Diff(it) => diff::run(&it, &services()?, screen).await,
        Command::Gc(it) => gc::run(&it, &services()?, screen).await,
        Command::Pki(it) => pki::run(it, home, screen),
        Command::Token(it) => token::run(it, home, screen),
        Command::Login(it) => login::run(&it, home, screen).await,
        Command::Completions(it) => completions::run(&it),
        Command::Tend => supervise::tend(home).await,
        Command::Supervise => supervise::run(home).await,
    }
}
