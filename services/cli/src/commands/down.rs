//! `kiln down`

use std::process::Stdio;

use clap::Args;
use kiln_service::config::Site;
use serde_json::json;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::{Screen, plain};
use crate::site::leftovers::{self, Leftover};
use crate::site::{self, programs, require_root, stop};
use crate::words::plural;

#[derive(Debug, Args)]
pub(crate) struct Down {
    /// Stop Kiln's services alone: the instances run on and serve, and `kiln up` takes them over again
    #[arg(long, conflicts_with = "delete_state")]
    keep_instances: bool,
    /// Delete the site's folder as well: definitions, images, releases, keys
    #[arg(long)]
    delete_state: bool,
}

pub(crate) async fn run(it: &Down, home: &Home, screen: Screen) -> Outcome {
    require_root("stopping Kiln")?;
    let site = match site::load(home) {
        Ok(site) => site,
        Err(failure) if failure.is_unavailable() => {
            screen.json(&json!({ "site": null, "stopped": [], "leftovers": [], "deleted": false }))?;
            return screen
                .line(format_args!("There is no site in {}: nothing to stop", home.folder().display()));
        }
        Err(failure) => return Err(failure),
    };
    let stopped = stop::all(&site, screen).await?;
    let mut found = Vec::new();
    if !it.keep_instances {
        purge(&site).await?;
        found = leftovers::find(&site);
    }
    let mut deleted = false;
    if it.delete_state {
        delete(&site, &found)?;
        deleted = true;
    }
    screen.json(&json!({
        "site": site.name.as_str(),
        "id": site.id.as_str(),
        "stopped": stopped,
        "instances_kept": it.keep_instances,
        "leftovers": found,
        "deleted": deleted,
    }))?;
    tell(it, &site, &found, screen)
}

fn tell(it: &Down, site: &Site, found: &[Leftover], screen: Screen) -> Outcome {
    if !found.is_empty() {
        screen.table(
            &["LEFT OVER", "NAME"],
            found.iter().map(|left| vec![plain(left.kind), plain(&left.name)]).collect(),
        )?;
        return Err(Failure::failed(
            "taking everything down",
            format!("{} left over", plural(found.len(), "thing")),
        )
        .reason("leftovers")
        .todo("kiln down again; what stays then was made by something else"));
    }
    if it.keep_instances {
        screen.line("Kiln is stopped; its instances run on and serve")?;
    } else if it.delete_state {
        return screen.line(format_args!("Kiln is down, and {} is deleted", site.home.display()));
    } else {
        screen.line(format_args!("Kiln is down; its state is kept in {}", site.home.display()))?;
    }
    screen.next(&["kiln up"])
}

/// The node takes back what it made: instances, mounts, networks, the edge.
async fn purge(site: &Site) -> Outcome {
    let what = "taking the instances and their network down";
    let binary = programs::sibling("kiln-node")?;
    let mut command = tokio::process::Command::new(&binary);
    command.arg("--home").arg(&site.home).arg("--purge").stdin(Stdio::null());
    let output = command.output().await.during(format_args!("starting {}", binary.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.trim().lines().last().unwrap_or_default().to_owned();
    Err(Failure::failed(what, format!("{} ended with {}: {line}", binary.display(), output.status))
        .todo("kiln down again; the node's log is in the site's folder `logs`"))
}

fn delete(site: &Site, found: &[Leftover]) -> Outcome {
    let what = format!("deleting {}", site.home.display());
    // Something that is still mounted there would be deleted with it, wherever it comes from.
    if let Some(left) = found.iter().find(|left| left.kind == "mount") {
        return Err(
            Failure::new(Code::Refused, what, format!("{} is still mounted", left.name)).todo("kiln down")
        );
    }
    std::fs::remove_dir_all(&site.home).during(what)
}
