//! Whose signatures let an image run.

use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::server::Web;
use kiln_tests::signing::{another_key, restart_with};
use kiln_tests::site::Site;
use kiln_tests::wait::until;

#[tokio::test(flavor = "multi_thread")]
async fn a_key_takes_anothers_place_and_what_nobody_vouches_for_is_not_launched() -> Result<()> {
    let web = Web::start(Site::up("signing")?).await?;
    let keys = web.site.home().join("keys");
    another_key(&keys, "next")?;
    let load = web.load();
    // Either is enough, and what was made before is signed by the new one as well; then both are needed.
    for threshold in [1, 2] {
        let both = format!(
            "[signing]\nkeys = [{{ file = \"keys/signing.key\" }}, {{ file = \"keys/next.key\" }}]\n\
             [[signing.trust]]\nservers = [\"*\"]\nkeys = [\"keys/signing.pub\", \"keys/next.pub\"]\n\
             threshold = {threshold}\n"
        );
        restart_with(&web.site, &both)?;
    }
    web.settled(1).await?;
    let image = web.site.json(&["image", "inspect", "web"])?;
    assert_eq!(image["verified"], true, "{image}");
    assert_eq!(image["key_id"].as_str().map(|ids| ids.split(", ").count()), Some(2), "{image}");
    web.say("second")?;
    web.settled(2).await?;
    // The new one alone, and the way back still goes.
    std::fs::remove_file(keys.join("signing.key"))?;
    std::fs::rename(keys.join("signing.pub"), keys.join("old.pub"))?;
    let next = "[signing]\nkeys = [{ file = \"keys/next.key\" }]\n";
    let trusts = |servers: &str, key: &str| {
        format!("{next}[[signing.trust]]\nservers = [\"{servers}\"]\nkeys = [\"keys/{key}.pub\"]\n")
    };
    restart_with(&web.site, &trusts("w*", "next"))?;
    web.settled(2).await?;
    web.site.kiln(&["rollback", "web"])?;
    web.settled(1).await?;
    load.stop().await.unfailing(500)?;

    // Nobody vouches for what runs any more: it runs on, and what dies is not launched again.
    for (signing, said) in [
        (trusts("other", "next"), "no rule of `signing.trust`"),
        (trusts("*", "unheard"), "no signature by a trusted key: signed by"),
    ] {
        another_key(&keys, "unheard")?;
        restart_with(&web.site, &signing)?;
        let before = web.site.fleet("web").await?;
        let running = before.instances.iter().find(|it| it.on_edge).ok_or("nothing runs")?.id.clone();
        let pid = web.pid_of(&running).await?;
        kiln_tests::command::run(std::process::Command::new("kill").args(["-9", &pid.to_string()]))?;
        until("it to be refused in words", Duration::from_secs(60), async || {
            let status = web.site.kiln(&["status", "web"])?;
            if status.contains(said) { Ok(()) } else { Err(status.into()) }
        })
        .await?;
        let fleet = web.site.fleet("web").await?;
        assert!(fleet.instances.iter().filter(|it| it.on_edge).count() < 3, "{fleet:?}");
        // With the rule back it is launched.
        restart_with(&web.site, &trusts("w*", "next"))?;
        web.site.settled("web", fleet.release, Duration::from_secs(120)).await?;
    }
    web.site.down()
}
