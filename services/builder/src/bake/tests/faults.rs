//! What archives and disks do wrong: it is said in words, nothing half done is kept, and the next bake works.

use kiln_test_servers::archive::Archive;

use super::*;

/// A file system of its own, smaller than what is put there.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        succeeds(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at));
        Self(at)
    }

    fn grow(&self) {
        succeeds(Command::new("mount").args(["-o", "remount,size=2g"]).arg(self.0));
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// Of the package `greeting` in an archive, whose key lies with the definition.
fn definition(kitchen: &Kitchen, archive: &Archive) -> String {
    let context = kitchen.folder.path().join("context");
    fs::create_dir_all(&context).unwrap();
    fs::copy(archive.key_ring(), context.join("archive.gpg")).unwrap();
    let url = archive.url();
    let archives = format!("[{{ url: '{url}', suite: test, components: [main], signedBy: archive.gpg }}]");
    format!(
        "  from: {{ debian: bookworm, variant: essential, archives: {archives} }}\n  steps: [{{ packages: [greeting] }}]"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_archive_or_a_disk_does_wrong_is_said_and_the_next_bake_works() {
    let kitchen = Kitchen::new("be000013", BakeLimits::default());
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Archive::serve(folder.path()).unwrap();
    archive.add("greeting", "1.0", "/opt/greeting", "Hello 1.0").unwrap();
    let (url, definition) = (archive.url(), definition(&kitchen, &archive));
    let lock = async || kitchen.lock(&definition, None, None).await.lock;
    let refused = async |words: &[&str]| {
        let Err(error) = kitchen.try_lock(&definition, None, None).await else {
            panic!("{words:?} was taken: {}", kitchen.log.lock().unwrap().join("\n"))
        };
        let said = error.to_string();
        assert!(words.iter().all(|word| said.contains(word)) && error.is_transient(), "{words:?}: {said}");
    };
    let fails = async |lock: &Lock, words: &[&str]| {
        let said = kitchen.baker.bake(lock, kitchen.run(1)).await.unwrap_err().to_string();
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        kitchen.assert_nothing_is_left();
    };

    let (packages, images) = (kitchen.folder.path().join("packages"), kitchen.folder.path().join("images"));
    {
        let (packages, images) = (Small::mount(&packages, "2m"), Small::mount(&images, "8m"));
        packages::PackageStore::open(packages.0).unwrap();
        let one = lock().await;
        fails(&one, &["No space left on device"]).await;
        packages.grow();
        fails(&one, &["No space left on device"]).await;
        images.grow();
        let image = kitchen.bake(&one, 2).await;
        assert_eq!(kitchen.read(&image, "opt/greeting").unwrap(), "Hello 1.0");
    }

    archive.set_away(true);
    refused(&[&url, "this machine reaches it"]).await;
    archive.set_away(false);
    archive.publish_by_a_stranger().unwrap();
    refused(&[&url, "NO_PUBKEY", "`signedBy`"]).await;

    archive.add("greeting", "1.1", "/opt/greeting", "Hello 1.1").unwrap();
    let two = lock().await;
    archive.flip_a_byte().unwrap();
    fails(&two, &["greeting_1.1", "Hash Sum mismatch"]).await;
    archive.flip_a_byte().unwrap();
    let image = kitchen.bake(&two, 3).await;
    assert_eq!(kitchen.read(&image, "opt/greeting").unwrap(), "Hello 1.1");

    let unchanged = || {
        let log = kitchen.log.lock().unwrap();
        log.iter().filter(|line| line.contains("no archive has published since")).count()
    };
    let before = unchanged();
    assert_eq!(lock().await, two);
    assert_eq!(unchanged(), before + 1, "{:?}", kitchen.log.lock().unwrap());

    archive.publish_of_before().unwrap();
    // The newer lists stay in force, and that is said.
    assert_eq!(lock().await, two);
    let log = kitchen.log.lock().unwrap().join("\n");
    assert!(log.contains(&format!("{url}/dists/test/InRelease went back in time")), "{log}");
    archive.publish().unwrap();
    assert_eq!(lock().await, two);
    kitchen.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_asks_who_is_there_is_told_and_nobody_else() {
    let mut kitchen = Kitchen::new("be000015", BakeLimits::default());
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Archive::serve(folder.path()).unwrap();
    archive.add("greeting", "1.0", "/opt/greeting", "Hello").unwrap();
    // Of kiln:hunter2.
    archive.ask_for("Basic a2lsbjpodW50ZXIy").unwrap();
    let (url, definition) = (archive.url(), definition(&kitchen, &archive));
    let refused = kitchen.try_lock(&definition, None, None).await.err().map(|error| error.to_string());
    assert!(refused.as_ref().is_some_and(|it| it.contains("401") && it.contains(&url)), "{refused:?}");

    let credentials = kitchen.folder.path().join("archives.conf");
    fs::write(&credentials, format!("machine {url} login kiln password hunter2\n")).unwrap();
    let config = (*kitchen.baker.config).clone();
    kitchen.baker = Baker::new(BakeConfig { archive_credentials: Some(credentials), ..config }).unwrap();
    let lock = kitchen.lock(&definition, None, None).await.lock;
    let image = kitchen.bake(&lock, 1).await;
    assert_eq!(kitchen.read(&image, "opt/greeting").unwrap(), "Hello");
    assert_eq!(kitchen.lock(&definition, None, None).await.lock, lock);
    let log = kitchen.log.lock().unwrap().join("\n");
    assert!(log.contains("no archive has published since"), "the release file is asked for with them: {log}");
    assert!(!log.contains("hunter2"), "{log}");
    let mut kept = Vec::new();
    for name in ["builder", "packages", "images"] {
        let found =
            Command::new("grep").args(["-rl", "hunter2"]).arg(kitchen.folder.path().join(name)).output();
        kept.extend(found.unwrap().stdout);
    }
    assert!(kept.is_empty(), "the password is in {}", String::from_utf8_lossy(&kept));
}
