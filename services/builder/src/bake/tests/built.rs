//! Images that begin with what a Containerfile makes.

use std::os::unix::fs::MetadataExt as _;

use kiln_test_servers::registry::{PASSWORD, Registry};

use super::foreign::{HERE, layout, push, settings, tar};
use super::*;

const SECRET: &str = "canary-of-a-containerfile-c41d";

/// Steps in it can do what those of docker can, and no more.
const FILE: &str = r#"ARG BASE
FROM ${BASE} AS one
ARG WHO=nobody
RUN echo "hello $WHO, $FROM" >/opt/greeting
RUN --mount=type=secret,id=token test "$(sha256sum </run/secrets/token)" = "$(cat /opt/wanted)"
RUN ! mount -t tmpfs none /mnt && ! chroot /proc/1/root true && ! [ -e /kiln ] && [ $(ls -d /proc/[0-9]* | wc -l) -lt 40 ]
FROM HOST/app:1
COPY --from=one /opt/greeting /opt/greeting
COPY --chown=daemon:daemon own /opt/own
ENV ADDED=yes
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_containerfile_is_built_on_pinned_images_and_what_it_makes_is_sealed() {
    let mut registry = Registry::on_loopback().unwrap();
    let host = registry.host(HERE);
    let (settings, _credentials) = settings(&registry);
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, SECRET).unwrap();
    let secrets = [("token".to_owned(), token)].into();
    let kitchen = Kitchen::of("be000012", BakeLimits::default(), Some(settings), secrets);
    registry.resume().await.unwrap();
    let base = kitchen.lock("  from: { debian: bookworm, variant: essential }", None, None).await;
    let base = kitchen.bake(&base.lock, 1).await;
    let layer = kitchen.folder.path().join("images/blobs/sha256").join(base.layers[0].digest.hex());
    let layer = fs::read(layer).unwrap();
    let push_app = |which: &str| {
        let local = tempfile::tempdir().unwrap();
        let more =
            tar(&format!("mkdir opt; echo {which} >opt/which; printf {SECRET} | sha256sum >opt/wanted"));
        layout(local.path(), &[layer.clone(), more], &[&format!("FROM={which}"), "PATH=/usr/bin:/usr/sbin"]);
        push(&registry, local.path(), "1");
    };
    push_app("one");

    let context = kitchen.folder.path().join("context/app");
    fs::create_dir_all(&context).unwrap();
    fs::write(context.join("Containerfile"), FILE.replace("HOST", &host)).unwrap();
    fs::write(context.join("own"), "mine\n").unwrap();
    let definition = format!(
        "  from:\n    containerfile: app/Containerfile\n    context: app\n    args: {{ BASE: '{host}/app:1', WHO: kiln }}\n    \
         secrets: [token]\n  env: {{ PLACE: here }}\n  steps:\n    \
         - run: 'test \"$FROM$ADDED$PLACE\" = oneyeshere && cat /opt/own >/opt/copied'\n"
    );
    let one = kitchen.lock(&definition, None, None).await.lock;
    // The tag moves on before the image was brought here.
    push_app("two");
    let image = kitchen.bake(&one, 2).await;
    assert_eq!(kitchen.read(&image, "opt/greeting").unwrap(), "hello kiln, one\n");
    assert_eq!(kitchen.read(&image, "opt/copied").unwrap(), "mine\n");
    let tree = kitchen.store().layer_tree(&image.layers[0].digest).unwrap();
    let own = fs::metadata(tree.join("opt/own")).unwrap();
    assert_eq!((own.uid(), own.gid(), own.mtime()), (1, 1, one.timestamp.as_second()));
    let env = |image: &BakedImage| {
        let config = kitchen.store().image(&image.digest).unwrap().config;
        config.config().as_ref().unwrap().env().clone().unwrap()
    };
    let wanted = ["ADDED=yes", "FROM=one", "PATH=/usr/bin:/usr/sbin", "PLACE=here"];
    assert_eq!(env(&image), wanted);
    let again = kitchen.bake(&one, 3).await;
    assert!(again.steps.iter().all(|step| step.cached), "{:?}", again.steps);
    assert_eq!((again.digest, env(&again)), (image.digest, wanted.map(str::to_owned).to_vec()));
    kitchen.assert_nothing_is_left();

    let pinned = kitchen.lock(&definition, None, Some(&one)).await;
    assert_eq!((pinned.lock == one, pinned.release_files), (true, None));
    let two = kitchen.lock(&definition, None, None).await.lock;
    let differences = crate::differences::differences(&one, &two);
    assert!(differences.iter().any(|line| line.contains(&format!("{host}/app:1 ("))), "{differences:?}");

    // What fails is told by its own last lines, and what can't be had by its name.
    let log = kitchen.log.lock().unwrap().join("\n");
    assert!(![SECRET, PASSWORD].iter().any(|canary| log.contains(canary)), "{log}");
    for (file, wanted) in [
        // Told by buildah's own last line: it may end before it has passed on the last ones of a command.
        (format!("FROM {host}/app:1\nRUN cp /run/secrets/token /opt/token || exit 3\n"), "exit status 3"),
        (
            format!("FROM {host}/app:1\nRUN --mount=type=secret,id=token cp /run/secrets/token /opt/token\n"),
            "secret token",
        ),
        (format!("FROM {host}/app:7\n"), "app:7"),
        (format!("FROM {host}/app:1\nCOPY ../../etc/passwd /x\n"), "passwd"),
        ("FROM -x\n".to_owned(), "neither a stage above nor the name of an image"),
        ("FROM a\nNONSENSE\n".to_owned(), "line 2"),
    ] {
        fs::write(context.join("Containerfile"), &file).unwrap();
        let error = match kitchen.try_lock(&definition, None, None).await {
            Err(error) => error,
            Ok(resolution) => kitchen.baker.bake(&resolution.lock, kitchen.run(4)).await.unwrap_err(),
        };
        assert!(error.to_string().contains(wanted), "{file}: {error}");
        kitchen.assert_nothing_is_left();
    }
    let log = kitchen.log.lock().unwrap().join("\n");
    assert!(![SECRET, PASSWORD].iter().any(|canary| log.contains(canary)), "{log}");
}
