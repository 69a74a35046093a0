//! A small change to a server whose image is there: a package against `docker build --no-cache` of that step, a file
//! against `buildah bud --layers`.

use std::path::Path;
use std::time::Instant;

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::docker::Docker;

use crate::Pairs;
use crate::bench::Bench;
use crate::buildah::Buildah;

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

async fn start(name: &str) -> Result<Bench> {
    Bench::start(name, DEFINITION, &[("site/index.html", "Hello 0")]).await
}

/// Both begin with Kiln's image, and find a file that has changed.
pub(crate) async fn a_file() -> Result<Pairs> {
    let mut bench = start("bench-file").await?;
    let context = bench.path("context");
    std::fs::create_dir_all(context.join("site"))?;
    std::fs::write(
        context.join("Containerfile"),
        "FROM localhost/base\nRUN nginx -v\nCOPY site/ /var/www/html/\nCMD [\"nginx\"]\n",
    )?;
    let buildah = Buildah::new(&bench.path("buildah"))?;
    buildah.take(&bench.site.export(&bench.newest, bench.folder.path())?)?;
    let mut pairs = Pairs::new("buildah bud --layers");
    // The first round fills buildah's cache and is not counted.
    for number in 0..=10 {
        let text = format!("Hello again {number}");
        bench.repo.write("web/site/index.html", &text)?;
        bench.repo.commit("Say something else")?;
        std::fs::write(context.join("site/index.html"), &text)?;
        let kiln = bench.bake().await?;
        let began = Instant::now();
        buildah.build(&context)?;
        if number > 0 {
            pairs.add(kiln, began.elapsed());
        }
    }
    bench.site.down()?;
    Ok(pairs)
}

/// Docker's base is what the package step is done on, with the archives' addresses that Kiln has.
pub(crate) async fn a_package() -> Result<Pairs> {
    let mut bench = start("bench-package").await?;
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

/// The base that Kiln has as an image of a server.
async fn import_base(bench: &Bench, docker: &Docker, context: &Path) -> Result<()> {
    let base = bench.bake_base("").await?;
    let root = context.join("root.tar");
    let file = root.display().to_string();
    bench.site.kiln(&["image", "export", &base, "--format", "root", "--file", &file])?;
    let archives = bench.put_archives(context)?;
    std::fs::write(context.join("Dockerfile"), format!("FROM scratch\nADD root.tar /\n{archives}"))?;
    run_command(docker.command().args(["build", "--quiet", "--tag", "base"]).arg(context))?;
    std::fs::remove_file(root)?;
    Ok(())
}
