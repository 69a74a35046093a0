//! What `kiln down` finds and removes, however things were when it was called.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::command::{both, run};
use kiln_tests::server::SETTLES;
use kiln_tests::site::Site;
use kiln_tests::wait::until;
use rustix::process::Signal;

/// Of processes with that command line.
fn pids(line: &[&str]) -> Result<Vec<i32>> {
    let wanted: Vec<u8> = line.iter().flat_map(|part| part.bytes().chain([0])).collect();
    let pids = std::fs::read_dir("/proc")?.flatten().filter_map(|it| it.file_name().to_str()?.parse().ok());
    let is_it = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == wanted);
    Ok(pids.filter(is_it).collect())
}

/// Below /sys/fs/cgroup, at any depth.
fn cgroups(mark: &str) -> Result<String> {
    run(Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &format!("*{mark}*")]))
}

fn mounts(mark: &str) -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter(|line| line.contains(mark)).map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_that_is_killed_in_the_middle_of_a_step_leaves_nothing() -> Result<()> {
    // A number that no other process sleeps for.
    let sleeper = ["sleep", &format!("9{}.25", std::process::id())];
    let site = Site::up("killed-bake")?;
    let folder = tempfile::tempdir()?;
    let definition = format!(
        "apiVersion: kiln/v1\nname: web\nimage:\n  from: {{ debian: bookworm }}\n  steps:\n    - run: {}\n  \
         command: [sleep, '1']\n",
        sleeper.join(" ")
    );
    std::fs::create_dir(folder.path().join("web"))?;
    std::fs::write(folder.path().join("web/server.yaml"), definition)?;
    site.kiln(&["apply", &folder.path().display().to_string()])?;
    until("the step to run", SETTLES, async || match pids(&sleeper)?.len() {
        0 => Err("it does not run".into()),
        _ => Ok(()),
    })
    .await?;

    let id = site.id()?;
    let work = PathBuf::from(format!("/run/kiln-bake-{id}"));
    // First what would start it again, and have it sweep.
    site.signal("supervisor", Signal::KILL)?;
    site.signal("builder", Signal::KILL)?;
    let builder = site.home().display().to_string();
    until("the builder to be gone", Duration::from_secs(10), async || {
        let left = std::fs::read_dir("/proc")?.flatten().any(|it| {
            let line = std::fs::read_to_string(it.path().join("cmdline")).unwrap_or_default();
            line.contains("kiln-builder") && line.contains(&builder)
        });
        if left { Err("it is there".into()) } else { Ok(()) }
    })
    .await?;
    assert!(!pids(&sleeper)?.is_empty(), "what it started runs on");
    assert!(
        !mounts(&format!("kiln-bake-{id}"))?.is_empty() && !cgroups(&format!("kiln-{id}-bake"))?.is_empty()
    );

    let down = site.json(&["down"])?;
    assert_eq!(down["leftovers"], serde_json::json!([]));
    assert_eq!(pids(&sleeper)?, Vec::<i32>::new());
    assert_eq!(mounts(&id)?, Vec::<String>::new());
    assert_eq!(cgroups(&id)?, "");
    assert!(!work.exists(), "{} is left", work.display());
    site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_no_pid_file_names_is_stopped_too() -> Result<()> {
    let site = Site::up("no-pid")?;
    let home = site.home().display().to_string();
    // As if it had been started at the moment when the supervisor was stopped.
    let files = ["monitor", "nats"].map(|process| site.home().join(format!("run/{process}.pid")));
    let processes =
        [site.pid("monitor")?, site.pid("nats")?].map(|pid| PathBuf::from(format!("/proc/{pid}")));
    for file in files {
        std::fs::remove_file(file)?;
    }
    let down = site.json(&["down"])?;
    for name in ["monitor", "nats-server"] {
        assert!(down["stopped"].as_array().is_some_and(|it| it.contains(&name.into())), "{down}");
    }
    // The supervisor was their parent, and is gone: nobody has to wait for them.
    let left =
        |path: &Path| std::fs::read_to_string(path.join("cmdline")).is_ok_and(|line| line.contains(&home));
    assert!(!processes.iter().any(|it| left(it)));
    site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn state_stays_while_something_is_left() -> Result<()> {
    let site = Site::up("held")?;
    let held = site.home().join("held");
    std::fs::create_dir(&held)?;
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&held))?;
    let refused = site.try_kiln(&["down", "--delete-state"])?;
    run(Command::new("umount").arg(&held))?;
    let said = both(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(&held.display().to_string()) && said.contains("is not deleted"), "{said}");
    assert!(said.contains("do: kiln down --delete-state again"), "{said}");
    assert!(site.home().join("site.toml").exists(), "with it the id would be gone");

    let down = site.json(&["down", "--delete-state"])?;
    assert_eq!((&down["leftovers"], &down["deleted"]), (&serde_json::json!([]), &true.into()));
    assert!(!site.home().exists());
    // What takes every test's site down finds none any more.
    assert!(site.kiln(&["down"])?.contains("nothing to stop"));
    Ok(())
}
