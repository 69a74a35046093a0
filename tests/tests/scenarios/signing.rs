//! Whose signatures let an image run.

use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::server::Web;
use kiln_tests::signing::{another_key, restart_with};
use kiln_tests::site::Site;
use kiln_tests::wait::until;
use serde_json::Value;

/// An instance is killed, and another one refused in these words.
async fn is_not_launched_again(web: &Web, said: &str) -> Result<()> {
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
    Ok(())
}

/// An image store's index that names no signature by a key, and others still.
fn without_signatures_of(site: &Site, index: &[u8], key: &str) -> Result<Vec<u8>> {
    let blob = |digest: &Value| -> Result<String> {
        let digest = digest.as_str().and_then(|it| it.strip_prefix("sha256:")).ok_or("no digest")?;
        Ok(std::fs::read_to_string(site.home().join("images/blobs/sha256").join(digest))?)
    };
    let mut index: Value = serde_json::from_slice(index)?;
    let entries = index["manifests"].as_array_mut().ok_or("no manifests")?;
    let before = entries.len();
    let mut kept = Vec::new();
    for entry in entries.drain(..) {
        if entry["artifactType"] == "application/vnd.kiln.signature.v1" {
            let manifest: Value = serde_json::from_str(&blob(&entry["digest"])?)?;
            if blob(&manifest["layers"][0]["digest"])?.contains(key) {
                continue;
            }
        }
        kept.push(entry);
    }
    assert!(kept.len() < before, "it signed nothing");
    assert!(kept.iter().any(|entry| entry["artifactType"].is_string()), "no other signature is left");
    *entries = kept;
    Ok(serde_json::to_vec(&index)?)
}

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

    // A signature of the key that was dropped, put back in the place of the new one's, lets nothing run.
    let new_id = web.site.json(&["image", "inspect", "web"])?["key_id"].as_str().ok_or("no key")?.to_owned();
    let index = web.site.home().join("images/index.json");
    let whole = std::fs::read(&index)?;
    std::fs::write(&index, without_signatures_of(&web.site, &whole, &new_id)?)?;
    restart_with(&web.site, &trusts("w*", "next"))?;
    is_not_launched_again(&web, "no signature by a trusted key: signed by").await?;
    std::fs::write(&index, whole)?;
    restart_with(&web.site, &trusts("w*", "next"))?;
    web.settled(1).await?;

    // Nobody vouches for what runs any more: it runs on, and what dies is not launched again.
    for (signing, said) in [
        (trusts("other", "next"), "no rule of `signing.trust`"),
        (trusts("*", "unheard"), "no signature by a trusted key: signed by"),
    ] {
        another_key(&keys, "unheard")?;
        restart_with(&web.site, &signing)?;
        is_not_launched_again(&web, said).await?;
        // With the rule back it is launched.
        restart_with(&web.site, &trusts("w*", "next"))?;
        web.settled(1).await?;
    }
    web.site.down()
}
