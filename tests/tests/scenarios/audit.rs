//! Who did what, and whether the records of it are as they were written.

use std::process::Output;
use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::server::Web;
use kiln_tests::site::Site;
use kiln_tests::wait::until;
use rustix::process::Signal;
use serde_json::Value;

fn texts<'a>(document: &'a Value, list: &str, field: &str) -> Vec<&'a str> {
    document[list].as_array().into_iter().flatten().filter_map(|it| it[field].as_str()).collect()
}

/// `kiln audit verify` with these heads, in the form for people.
fn verify(site: &Site, heads: &[&str]) -> Result<Output> {
    let mut arguments = vec!["audit", "verify"];
    for head in heads {
        arguments.extend(["--head", head]);
    }
    site.try_kiln(&arguments)
}

/// Another hash of the same form.
fn forged(head: &str) -> String {
    let (before, last) = head.split_at(head.len() - 1);
    format!("{before}{}", if last == "0" { "1" } else { "0" })
}

/// Who changes a record in a store's file is found by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_changed_is_named() -> Result<()> {
    let web = Web::start(Site::up_on_files("audit")?).await?;
    let sealed = async || {
        until("the records to be sealed", Duration::from_secs(10), async || {
            let found = web.site.json(&["audit", "verify"])?;
            // A head is published after it is sealed.
            let waiting = found["services"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|it| it["not_sealed_yet"] != 0 || it["published_heads"] == 0 && it["records"] != 0);
            if waiting || !found["not_compared"].is_null() {
                Err(found.to_string().into())
            } else {
                Ok(found)
            }
        })
        .await
    };
    let found = sealed().await?;
    println!("{found:#}");
    let records = web.site.json(&["audit", "--server", "web", "-n", "0"])?;
    let actions = texts(&records, "records", "action");
    for action in [
        "apply",
        "definition.applied",
        "build.queued",
        "revision.created",
        "release.created",
        "rollout.started",
        "instances.changed",
        "rollout.succeeded",
    ] {
        assert!(actions.contains(&action), "{action} is not in {actions:?}");
    }
    let apply = records["records"].as_array().into_iter().flatten().find(|it| it["action"] == "apply");
    let apply = apply.ok_or("no apply")?;
    assert!(apply["request_id"].as_str().is_some_and(|id| !id.is_empty()) && apply["before"].is_null());
    assert_eq!(
        texts(&web.site.json(&["audit", "--actor", "nobody-at-all"])?, "records", "actor"),
        Vec::<&str>::new()
    );

    // Without the broker nothing is proved, but for what was kept.
    let heads = texts(&found, "services", "keep");
    assert_eq!(heads.len(), 4, "{found:#}");
    let of_builder =
        heads.iter().find(|head| head.starts_with("builder=")).ok_or("no head of the builder")?;
    let wrong = forged(of_builder);
    web.site.signal("nats", Signal::STOP)?;
    let without =
        [&[][..], heads.as_slice(), &[of_builder], &[wrong.as_str()]].map(|it| verify(&web.site, it));
    web.site.signal("nats", Signal::CONT)?;
    for (verified, (code, words)) in without.into_iter().zip([
        (5, "nothing to compare those of builder, deployer, monitor with"),
        (0, "Not compared with what was published"),
        (5, "nothing to compare those of deployer, monitor with"),
        (1, "is not as in the head that was kept"),
    ]) {
        let verified = verified?;
        let said = both(&verified);
        assert!(verified.status.code() == Some(code) && said.contains(words), "not {code}, {words}: {said}");
    }
    until("the broker to be back", Duration::from_secs(30), async || {
        let verified = verify(&web.site, &heads)?;
        if verified.status.success() { Ok(()) } else { Err(both(&verified).into()) }
    })
    .await?;
    assert_eq!(verify(&web.site, &[&wrong])?.status.code(), Some(1));

    let sequence = apply["sequence"].as_u64().ok_or("no sequence")?;
    let change =
        format!("UPDATE audit SET body = replace(body, '\"apply\"', '\"plan\"') WHERE sequence = {sequence}");
    web.site.change_store("builder", &change).await?;
    let verified = web.site.try_kiln(&["audit", "verify"])?;
    assert_eq!(verified.status.code(), Some(1), "{}", both(&verified));
    assert!(
        both(&verified).contains(&format!("record {sequence} is not as it was sealed")),
        "{}",
        both(&verified)
    );
    web.site.down()
}
