//! A small change to a server whose image is there: a package against `docker build --no-cache` of that step, a file
//! against `buildah bud --layers`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::docker::Docker;
use kiln_tests::repo::Repo;
use kiln_tests::site::{Site, tagged};

use crate::Pairs;

const BOUND: Duration = Duration::from_secs(300);
/// One for each round, the first of which is not counted. Each needs nothing but what a base has.
const PACKAGES: [&str; 6] = ["hello", "tree", "pv", "time", "cpio", "ed"];

const DEFINITION: &str = "\
apiVersion: kiln/v1
name: web
image:
  from: { debian: bookworm }
  steps:
    - packages: [nginx-light]
    - files: [{ src: site/, dest: /var/www/html }]
  command: [sleep, infinity]
run:
  replicas: 1
";
const INSTALLED: &str = "nginx-light";

/// A site with an image of the definition, and a folder for what its peer needs.
struct Bench {
    site: Site,
    repo: Repo,
    folder: tempfile::TempDir,
    newest: String,
}

impl Bench {
    async fn start(name: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let definition = folder.path().join("definition");
        std::fs::create_dir_all(definition.join("site"))?;
        std::fs::write(definition.join("server.yaml"), DEFINITION)?;
        std::fs::write(definition.join("site/index.html"), "Hello 0")?;
        let repo = Repo::with(&folder.path().join("servers"), "web", &definition)?;
        let site = Site::up(name)?;
        site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        let newest = site.built("web", None, BOUND).await?;
        Ok(Self { site, repo, folder, newest })
    }

    /// From a commit that is there to the image of it.
    async fn bake(&mut self) -> Result<Duration> {
        let began = Instant::now();
        self.site.kiln(&["apply", &self.repo.url(), "--branch", "main"])?;
        self.newest = self.site.built("web", Some(&self.newest), BOUND).await?;
        Ok(began.elapsed())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Both begin with Kiln's image, and find a file that has changed.
pub(crate) async fn a_file() -> Result<Pairs> {
    let mut bench = Bench::start("bench-file").await?;
    let storage = bench.path("buildah");
    let (root, run) = (storage.join("root"), storage.join("run"));
    let context = bench.path("context");
    std::fs::create_dir_all(context.join("site"))?;
    std::fs::write(
        context.join("Containerfile"),
        "FROM localhost/base\nRUN nginx -v\nCOPY site/ /var/www/html/\nCMD [\"nginx\"]\n",
    )?;
    let base = format!("containers-storage:[overlay@{}+{}]localhost/base", root.display(), run.display());
    let image = format!("oci:{}", tagged(&bench.site.export("web", bench.folder.path())?)?);
    run_command(Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet", &image, &base]))?;
    let bud = || {
        let mut bud = Command::new("buildah");
        bud.arg("--root").arg(&root).arg("--runroot").arg(&run).args(["--storage-driver", "overlay"]);
        bud.args(["bud", "--layers", "--quiet", "--pull-never", "--isolation", "chroot", "--tag", "web"]);
        bud.arg(&context);
        bud
    };
    let mut pairs = Pairs::new("buildah bud --layers");
    // The first round fills buildah's cache and is not counted.
    for number in 0..=10 {
        let text = format!("Hello again {number}");
        bench.repo.write("web/site/index.html", &text)?;
        bench.repo.commit("Say something else")?;
        std::fs::write(context.join("site/index.html"), &text)?;
        let kiln = bench.bake().await?;
        let began = Instant::now();
        run_command(&mut bud())?;
        if number > 0 {
            pairs.add(kiln, began.elapsed());
        }
    }
    bench.site.down()?;
    Ok(pairs)
}

/// Docker's base is what the package step is done on, with the archives' addresses that Kiln has.
pub(crate) async fn a_package() -> Result<Pairs> {
    let mut bench = Bench::start("bench-package").await?;
    let docker = Docker::start_aside(&bench.path("docker"))?;
    let context = bench.path("context");
    std::fs::create_dir(&context)?;
    import_base(&bench, &docker, &context).await?;
    let build = |package: &str| {
        let file = format!(
            "FROM base\nRUN apt-get -qq update && apt-get -qq install --yes --no-install-recommends \
             {INSTALLED} {package}\n"
        );
        std::fs::write(context.join("Dockerfile"), file)?;
        let mut build = docker.command();
        build.args(["build", "--no-cache", "--quiet", "--network", "host"]).arg(&context);
        let began = Instant::now();
        run_command(&mut build)?;
        Ok::<_, kiln_tests::Error>(began.elapsed())
    };
    let mut pairs = Pairs::new("docker build --no-cache");
    let mut installed = INSTALLED.to_owned();
    for (number, package) in PACKAGES.into_iter().enumerate() {
        let wanted = format!("{INSTALLED}, {package}");
        bench.repo.replace("web/server.yaml", &format!("[{installed}]"), &format!("[{wanted}]"))?;
        bench.repo.commit("Add a package")?;
        installed = wanted;
        let kiln = bench.bake().await?;
        let theirs = build(package)?;
        if number > 0 {
            pairs.add(kiln, theirs);
        }
    }
    drop(docker);
    bench.site.down()?;
    Ok(pairs)
}

/// The same minbase, which Kiln has as a server's image.
async fn import_base(bench: &Bench, docker: &Docker, context: &Path) -> Result<()> {
    let text = DEFINITION.replace("name: web", "name: base");
    let (head, _) = text.split_once("  steps:").ok_or("the definition has steps")?;
    let definition = bench.path("base");
    std::fs::create_dir(&definition)?;
    std::fs::write(definition.join("server.yaml"), format!("{head}  command: [sh]\nrun:\n  replicas: 1\n"))?;
    let repo = Repo::with(&bench.path("bases"), "base", &definition)?;
    bench.site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
    bench.site.built("base", None, BOUND).await?;
    let root = context.join("root.tar");
    bench.site.kiln(&[
        "image",
        "export",
        "base",
        "--format",
        "root",
        "--file",
        &root.display().to_string(),
    ])?;
    let home = bench.site.home();
    let found = run_command(Command::new("find").arg(home).args(["-name", "sources.sources"]))?;
    let sources = found.lines().next().ok_or("the archives that were asked")?;
    std::fs::copy(sources, context.join("archives.sources"))?;
    // How this machine reaches them.
    let dump = run_command(Command::new("apt-config").arg("dump"))?;
    let ways: Vec<_> = dump.lines().filter(|line| line.starts_with("Acquire::http")).collect();
    std::fs::write(context.join("ways"), ways.join("\n"))?;
    let file = "FROM scratch\nADD root.tar /\nCOPY archives.sources /etc/apt/sources.list.d/\n\
                COPY ways /etc/apt/apt.conf.d/\nRUN rm -f /etc/apt/sources.list\n";
    std::fs::write(context.join("Dockerfile"), file)?;
    run_command(docker.command().args(["build", "--quiet", "--tag", "base"]).arg(context))?;
    std::fs::remove_file(root)?;
    Ok(())
}
