//! `kiln down`

use clap::Args;
use kiln_service::config::Site;
use kiln_service::machine::Leftover;
use serde_json::json;

use crate::failure::{During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::{Screen, plain};
use crate::site::{self, leftovers, require_root, stop};
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
    // One that fails does not keep the other from its work.
    let swept = clear(&site, "kiln-builder", "--sweep", "removing what builds left").await;
    let mut found = Vec::new();
    if it.keep_instances {
        swept?;
    } else {
        let purged =
            clear(&site, "kiln-node", "--purge", "taking the instances and their network down").await;
        swept.and(purged)?;
        found = leftovers::find(&site).await?;
    }
    // With what is left, the folder is what tells whose it is and how to remove it.
    let deleted = it.delete_state && found.is_empty();
    if deleted {
        let what = format!("deleting {}", site.home.display());
        std::fs::remove_dir_all(&site.home).during(what)?;
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
            found.iter().map(|left| vec![plain(&left.kind), plain(&left.name)]).collect(),
        )?;
        let mut why = format!("{} left over", plural(found.len(), "thing"));
        if it.delete_state {
            why.push_str(&format!(", so {} is not deleted", site.home.display()));
        }
        return Err(Failure::failed("taking everything down", why).reason("leftovers").todo(format!(
            "kiln down{} again; what stays then is held by something else: end that first",
            if it.delete_state { " --delete-state" } else { "" }
        )));
    }
    if it.keep_instances {
        screen.line("Kiln is stopped; its instances run on and serve")?;
    } else if it.delete_state {
        if let Some(store) = &site.store {
            // Kiln may lack the rights for it, and a database is often kept longer than its site.
            let schemas = format!("kiln_{}_builder, _deployer and _monitor", site.id);
            screen
                .line(format_args!("Its state is kept in {}: drop the schemas {schemas} there", store.url))?;
        }
        return screen.line(format_args!("Kiln is down, and {} is deleted", site.home.display()));
    } else {
        screen.line(format_args!("Kiln is down; its state is kept in {}", site.home.display()))?;
    }
    screen.next(&["kiln up"])
}

/// A service takes back what it made.
async fn clear(site: &Site, program: &str, task: &str, what: &str) -> Outcome {
    let done = leftovers::asked(program, site, task, what).await;
    done.map(drop)
        .map_err(|failure| failure.todo("kiln down again; the logs are in the site's folder `logs`"))
}
