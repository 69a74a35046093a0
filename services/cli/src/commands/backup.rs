//! `kiln backup` and `kiln restore`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::backup::{self, Key, Restored};
use crate::failure::{During as _, Outcome};
use crate::home::Home;
use crate::screen::Screen;
use crate::site::{self, require_root};
use crate::words::plural;

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The file to write; it must not exist
    file: PathBuf,
    /// The key that the site's secrets in it are encrypted with; made where it does not exist. Keep it apart from the
    /// backups: whoever has both has the site's keys, and without it a backup can't be restored
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The file that `kiln backup` wrote
    file: PathBuf,
    /// The key that it was made with
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

pub(crate) async fn run(it: &Backup, home: &Home, screen: Screen) -> Outcome {
    let site = site::load(home)?;
    let (key, made) = Key::ensure(&it.key)?;
    let written = backup::write(&site, &key, &it.file).await?;
    let file = std::path::absolute(&it.file).during("looking for the file")?;
    screen.json(&json!({
        "site": site.name.as_str(),
        "file": file,
        "bytes": written.bytes,
        "images": written.images,
        "left_out": written.left_out,
        "key": it.key,
        "key_made": made,
    }))?;
    screen.line(format_args!(
        "{} holds the site {}: its state, its keys and {}, {} MB",
        file.display(),
        site.name,
        plural(written.images, "image"),
        written.bytes.div_ceil(1_000_000)
    ))?;
    if made {
        screen.line(format_args!(
            "The new key {} opens its secrets: keep it safe, and apart from the backup",
            it.key.display()
        ))?;
    }
    if !written.left_out.is_empty() {
        screen.line(
            "\nWarning: the settings name files that are not in it. Keep a copy of each, and put it back where it was \
             before a restored site is started:",
        )?;
        for path in &written.left_out {
            screen.line(format_args!("  {}", path.display()))?;
        }
    }
    screen.next(&[format!("kiln restore {} --key {}", file.display(), it.key.display())])
}

pub(crate) async fn restore(it: &Restore, home: &Home, screen: Screen) -> Outcome {
    require_root("restoring a site")?;
    let key = Key::read(&it.key)?;
    let by = kiln_service::server::who();
    let Restored { site, time, blobs } = backup::restore(&it.file, &key, home.folder(), &by).await?;
    screen.json(&json!({
        "site": site.name.as_str(),
        "id": site.id.as_str(),
        "home": site.home,
        "time": time.to_string(),
        "blobs": blobs,
    }))?;
    screen.line(format_args!("The site {} is in {}, as it was at {time}", site.name, site.home.display()))?;
    screen.next(&["kiln up"])
}
