//! A Debian system that Kiln bakes is the one that mmdebstrap makes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use kiln_tests::Result;
use kiln_tests::command::run;
use kiln_tests::server::SETTLES;
use kiln_tests::site::{Site, tagged};
use kiln_tests::tree;

const DEFINITION: &str = "\
apiVersion: kiln/v1
name: plain
image:
  from: { debian: bookworm }
  steps:
    - packages: [nginx-light]
  command: [nginx]
";

/// The paths that may differ, each with its reason.
const LISTED: &str = include_str!("../../mmdebstrap-differences.txt");
const MAX_LISTED: usize = 25;

#[tokio::test(flavor = "multi_thread")]
async fn the_tree_is_what_mmdebstrap_makes_of_the_same_packages() -> Result<()> {
    let site = Site::up("mmdebstrap")?;
    let folder = tempfile::tempdir()?;
    let definition = folder.path().join("plain");
    std::fs::create_dir(&definition)?;
    std::fs::write(definition.join("server.yaml"), DEFINITION)?;
    site.kiln(&["apply", definition.to_str().ok_or("a text")?])?;
    // The server has it a moment later.
    let build = site.built("plain", None, SETTLES).await?;
    let layout = site.export(&build, folder.path())?;
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(tagged(&layout)?)
        .arg(folder.path().join("bundle")))?;
    let ours = folder.path().join("bundle/rootfs");

    let theirs = folder.path().join("mmdebstrap");
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=minbase", "--include=nginx-light", "bookworm"])
        .arg(&theirs))?;
    assert_eq!(packages(&ours)?, packages(&theirs)?, "the same packages in the same versions");

    let (ours, theirs) = (tree::read(&ours)?, tree::read(&theirs)?);
    assert!(theirs.len() > 5000, "{} paths", theirs.len());
    let mut unlisted = tree::differences(&ours, &theirs);
    let listed: BTreeMap<&str, &str> = LISTED
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once("  "))
        .map(|(path, reason)| (path.trim(), reason.trim()))
        .collect();
    assert!(listed.len() <= MAX_LISTED, "{} paths are listed", listed.len());
    assert!(listed.values().all(|reason| !reason.is_empty()), "each with a reason");
    let stale: Vec<_> = listed.keys().filter(|path| !unlisted.iter().any(|found| found == *path)).collect();
    assert!(stale.is_empty(), "listed, and yet the same: {stale:#?}");
    unlisted.retain(|found| !listed.contains_key(found.as_str()));
    let shown = |found: &String| {
        let path = &found[2..];
        format!("{found}\n    ours   {:?}\n    theirs {:?}", ours.get(path), theirs.get(path))
    };
    assert!(unlisted.is_empty(), "{}", unlisted.iter().map(shown).collect::<Vec<_>>().join("\n"));
    site.down()
}

/// What dpkg says is installed in a tree: a line for each package with its version.
fn packages(root: &Path) -> Result<String> {
    run(Command::new("dpkg-query").arg("--admindir").arg(root.join("var/lib/dpkg")).args([
        "--show",
        "--showformat",
        "${Package} ${Version} ${Architecture} ${Status}\n",
    ]))
}
