//! Nothing changed, inputs pinned: `kiln build --pinned` against a fully cached `buildah bud --layers`.

use std::process::Command;
use std::time::Instant;

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::server::Web;
use kiln_tests::site::Site;

use crate::Pairs;

const ROUNDS: u64 = 15;

const CONTAINERFILE: &str = "\
FROM BASE
RUN nginx -v
COPY site/ /var/www/html/
COPY nginx.conf /etc/nginx/nginx.conf
CMD [\"nginx\"]
";

pub(crate) async fn run() -> Result<Pairs> {
    let web = Web::start(Site::up("bench-nothing")?).await?;
    let context = web.folder().join("context");
    run_command(Command::new("cp").arg("-r").arg(web.repo.path().join("web")).arg(&context))?;
    let base = format!("oci:{}", web.export()?.display());
    std::fs::write(context.join("Containerfile"), CONTAINERFILE.replace("BASE", &base))?;
    let storage = web.folder().join("buildah");
    let buildah = || {
        let mut buildah = Command::new("buildah");
        buildah.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
        buildah.args(["bud", "--layers", "--quiet", "--isolation", "chroot", "--tag", "web"]).arg(&context);
        buildah
    };
    // Fills its cache.
    run_command(&mut buildah())?;

    let mut pairs = Pairs::new("buildah bud --layers");
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let said = web.site.json(&["build", "web", "--pinned"])?;
        let kiln = began.elapsed();
        if said["unchanged"] != true {
            return Err(format!("something was built: {said}").into());
        }
        let began = Instant::now();
        run_command(&mut buildah())?;
        pairs.add(kiln, began.elapsed());
    }
    web.site.down()?;
    Ok(pairs)
}
