//! A playbook or a manifest against the image under construction: by the real program, which lies beside the image, in the
//! sandbox, with the archives of the lock as all that it reaches.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use kiln_builder_core::build::Phase;
use kiln_model::definition::Provisioner;
use kiln_model::lock::Provision;

use super::context::Contents;
use super::error::BakeError;
use super::install::{Installer, forbid_services, hides_ischroot};
use super::offered::Offered;
use super::packages::PackageStore;
use super::sandbox::{Access, Folder, Job, Rights};
use super::snapshot::{PORT, Snapshot};
use super::tools::{self, Recipe};
use super::tree::{SHIFT, Tree};
use super::work::mount_shifted;
use super::{ansible, files, puppet, reach};

/// Where a step sees the folder of its playbook or manifest.
pub(crate) const FILES: &str = "/run/kiln/files";
/// Where it sees what it is told beside.
pub(crate) const TOLD: &str = "/run/kiln/told";
/// For what the program itself writes.
pub(crate) const HOME: &str = "/run/kiln/home";
const APT: &str = "/run/kiln/apt";
const ARCHIVES: &str = "/run/kiln/archives";
const SOCAT: &str = "kiln-socat";
/// Besides the program: what leads from the sandbox's own network to the socket of the archives, and a shell to make the tree
/// with.
const BESIDES: [&str; 2] = ["socat", "dash"];

/// How one program is run.
pub(crate) struct Program {
    pub(crate) recipe: Recipe<'static>,
    pub(crate) env: Vec<(&'static str, String)>,
    /// Files in [`TOLD`].
    pub(crate) told: Vec<(&'static str, String)>,
    /// A shell function `play`, which fails where the program does, and one `changed`, which succeeds where the last `play`
    /// has changed something.
    pub(crate) functions: String,
    /// What has to hold after the first `play`, as a shell command.
    pub(crate) check: String,
}

/// What the step runs in.
pub(crate) struct Place<'a> {
    pub(crate) installer: &'a Installer<'a>,
    pub(crate) store: &'a PackageStore,
    /// Tells the step's folders from those of others.
    pub(crate) at: usize,
    pub(crate) step: &'a str,
    pub(crate) root: &'a Path,
    /// What the step changes, without what lies below.
    pub(crate) upper: &'a Path,
    pub(crate) env: BTreeMap<String, String>,
}

/// What is asked of the image's archives, to lie beside the image.
pub(crate) fn packages(by: &Provisioner) -> Vec<&'static str> {
    let own = match by {
        Provisioner::Ansible { .. } => ansible::PACKAGES.as_slice(),
        Provisioner::Puppet => puppet::PACKAGES.as_slice(),
    };
    own.iter().copied().chain(BESIDES).collect()
}

pub(crate) fn run(provision: &Provision, place: Place<'_>) -> Result<(), BakeError> {
    let Place { installer, store, at, step, root, upper, mut env } = place;
    let program = match &provision.by {
        Provisioner::Ansible { vars } => ansible::program(provision, vars)?,
        Provisioner::Puppet => puppet::program(provision),
    };
    let sandbox = installer.sandbox;
    let home = &sandbox.config.home;
    let folder = |what: &str| sandbox.work.folder(&format!("{what}{at}"), SHIFT);

    let tree = tools::tree(installer, &provision.tools, &program.recipe)?;
    let tools = folder("tools")?;
    mount_shifted(&tree, &tools, true)?;
    let its_files = folder("files")?;
    let opened = Tree::open(&its_files, SHIFT).map_err(BakeError::io("open", &its_files))?;
    files::put(&opened, &provision.files, &Contents::open(home)?)?;

    let snapshot = Snapshot::open(home, &provision.snapshot)?;
    let apt = folder("apt")?;
    let lists = apt.join("lists");
    fs::create_dir(&lists)
        .and_then(|()| chown(&lists, Some(SHIFT), Some(SHIFT)))
        .map_err(BakeError::io("make folder", &lists))?;
    snapshot.put_lists(&lists)?;
    let told = folder("told")?;
    let mut all = program.told;
    all.push(("archives.sources", snapshot.sources().to_owned()));
    all.push(("apt.conf", apt_configuration()));
    for (name, content) in all {
        let path = told.join(name);
        fs::write(&path, content).map_err(BakeError::io("write", &path))?;
    }
    let archives = folder("archives")?;
    let transport = sandbox.config.transport(sandbox.log, sandbox.cancel);
    let bytes = sandbox.config.limits.tree;
    let _offered = Offered::begin(snapshot, store.clone(), &archives.join("socket"), bytes, transport)?;

    env.insert("APT_CONFIG".to_owned(), format!("{TOLD}/apt.conf"));
    env.insert("LANG".to_owned(), "C.UTF-8".to_owned());
    // Where systemd would start services, they are enabled and not started.
    env.insert("SYSTEMD_OFFLINE".to_owned(), "1".to_owned());
    env.extend(program.env.into_iter().map(|(name, value)| (name.to_owned(), value)));
    let image = Tree::open(root, SHIFT).map_err(BakeError::io("open", root))?;
    let hidden = hides_ischroot(&image)?;
    forbid_services(&image)?;
    let seen = |outside: PathBuf, inside, access| Folder { outside, inside, access };
    let job = Job {
        step,
        root,
        script: &script(&program.functions, &program.check, provision.idempotent),
        env: &env,
        folders: &[
            seen(tools, tools::INSIDE, Access::ReadAndRun),
            // A playbook may run a script that lies beside it.
            seen(its_files, FILES, Access::ReadAndRun),
            seen(told, TOLD, Access::Read),
            seen(archives, ARCHIVES, Access::Read),
            seen(apt, APT, Access::Write),
        ],
        hide_ischroot: hidden,
        own_run: true,
        resolver: None,
        rights: Rights::Step,
    };
    let step = reach::Step { at, reach: &provision.reach, upper };
    installer.timings.during(Phase::Run, || reach::run(sandbox, &step, &job))
}

/// What every tree of tools has beside its own program.
pub(crate) const fn socat() -> (&'static str, &'static str) {
    ("usr/bin/socat", SOCAT)
}

/// In the place of the image's own sources: these are what the lock says, and others can't be reached.
fn apt_configuration() -> String {
    format!(
        // Named as the main file too, which is read after what the image has in apt.conf.d, and so wins.
        r#"Dir::Etc::Main "{TOLD}/apt.conf";
Dir::Etc::SourceList "{TOLD}/archives.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "{APT}/lists";
Dir::Cache "{APT}/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::By-Hash "no";
Acquire::Check-Valid-Until "false";
Acquire::Check-Date "false";
Acquire::http::Proxy::127.0.0.1 "DIRECT";
"#
    )
}

fn script(functions: &str, check: &str, idempotent: bool) -> String {
    let second = if idempotent {
        "echo 'a second time, which has to change nothing:'\n\
         play\n\
         if changed; then\n\
         echo 'the second run changed something: see above what' >&2\n\
         exit 1\n\
         fi\n"
    } else {
        ""
    };
    // What the program has started is told to end and given the time for it: killed with the sandbox, it would leave half of
    // what it was writing.
    format!(
        "mkdir -p {APT}/lists/partial {APT}/cache/archives/partial {HOME}\n\
         {tools}/usr/bin/{SOCAT} TCP-LISTEN:{PORT},bind=127.0.0.1,reuseaddr,fork UNIX-CONNECT:{ARCHIVES}/socket &\n\
         cd {FILES}\n\
         {functions}\n\
         play\n\
         {check}\n\
         {second}\
         trap '' TERM\n\
         kill -TERM -1 || :\n\
         tries=100\n\
         while set -- /proc/[0-9]*; [ $# -gt 1 ] && [ $tries -gt 0 ]; do sleep 0.1; tries=$((tries - 1)); done\n",
        tools = tools::INSIDE,
    )
}

/// For a shell.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
