//! Nothing changed, inputs pinned: `kiln apply` and `kiln build --pinned` against a fully cached `buildah bud --layers`. Both
//! look whether a file of the definition has changed, and find that nothing is to be built.

use std::process::Command;
use std::time::Instant;

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::server::Web;
use kiln_tests::site::Site;

use crate::Pairs;
use crate::buildah::Buildah;

const ROUNDS: u64 = 15;

const CONTAINERFILE: &str = "\
FROM localhost/base
RUN nginx -v
COPY site/ /var/www/html/
COPY nginx.conf /etc/nginx/nginx.conf
CMD [\"nginx\"]
";

pub(crate) async fn run() -> Result<Pairs> {
    let web = Web::start(Site::up("bench-nothing")?).await?;
    let context = web.folder().join("context");
    run_command(Command::new("cp").arg("-r").arg(web.repo.path().join("web")).arg(&context))?;
    std::fs::write(context.join("Containerfile"), CONTAINERFILE)?;
    let buildah = Buildah::new(&web.folder().join("buildah"))?;
    buildah.take(&web.export()?)?;
    // Fills its cache.
    buildah.build(&context)?;

    let mut pairs = Pairs::new("buildah bud --layers");
    for _ in 0..ROUNDS {
        let began = Instant::now();
        web.site.kiln(&["apply", &web.repo.url(), "--branch", "main"])?;
        let said = web.site.json(&["build", "web", "--pinned"])?;
        let kiln = began.elapsed();
        if said["unchanged"] != true {
            return Err(format!("something was built: {said}").into());
        }
        let began = Instant::now();
        buildah.build(&context)?;
        pairs.add(kiln, began.elapsed());
    }
    web.site.down()?;
    Ok(pairs)
}
