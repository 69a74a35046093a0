//! Certificates that are renewed, and authorities that take each other's place, under calls.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use kiln_api::monitor::ListHealthRequest;
use kiln_service::access::Role;
use kiln_service::pki::Authority;
use kiln_service::server::Limits;

use crate::monitor::Client;
use crate::site::{Site, identity, replace, site_name};

async fn look(client: &Client) -> Result<(), tonic::Status> {
    client.clone().list_health(ListHealthRequest::default()).await.map(drop)
}

fn renew(authority: &Authority, path: &Path, role: Role, life: Duration) {
    let issued = authority.issue(&identity(role), &["127.0.0.1".to_owned()], life, SystemTime::now());
    replace(path, &issued.unwrap().reveal());
}

/// Certificates of four seconds, renewed each second and a half on both sides for three lives: no call fails.
#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_through_renewals() {
    let site = Site::start().await;
    let (own, of_server) = (site.path("deployer.pem"), site.path("monitor.pem"));
    let life = Duration::from_secs(4);
    renew(&site.authority, &own, Role::Deployer, life);
    let client = site.client(Some(&own), None);
    let begin = Instant::now();
    let (mut calls, mut renewals) = (0, 0);
    while begin.elapsed() < 3 * life {
        if begin.elapsed() >= renewals * Duration::from_millis(1500) {
            renew(&site.authority, &own, Role::Deployer, life);
            renew(&site.authority, &of_server, Role::Monitor, life);
            renewals += 1;
        }
        look(&client).await.unwrap_or_else(|status| panic!("call {calls} after {renewals}: {status:?}"));
        calls += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(calls > 200 && renewals >= 7, "{calls} {renewals}");
    // What comes of a file that can't be used: the last good one, until it ends.
    replace(&of_server, "no certificate");
    look(&client).await.unwrap();
    site.stop().await;
}

/// The connection of one who does not renew ends with the certificate, calls under way with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_ends_ends_its_connection() {
    let site = Site::start().await;
    let path = site.issue(&identity(Role::Viewer), SystemTime::now(), Duration::from_secs(2));
    let client = site.client(Some(&path), None);
    let mut stream = client
        .clone()
        .watch_health(kiln_api::monitor::WatchHealthRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.message()).await;
    assert!(ended.expect("the stream outlives the certificate").is_err());
    assert!(look(&client).await.is_err());
    site.stop().await;
}

/// Old and new certificates know each other while both authorities are trusted.
#[tokio::test(flavor = "multi_thread")]
async fn authorities_take_each_others_place_under_calls() {
    let site = Site::start_with(Limits::default()).await;
    let hour = Duration::from_secs(3600);
    let (own, of_server) = (site.path("deployer.pem"), site.path("monitor.pem"));
    renew(&site.authority, &own, Role::Deployer, hour);
    let stranger = site.certificate(Role::Viewer);
    let client = site.client(Some(&own), None);
    look(&client).await.unwrap();
    let next = Authority::new(site_name()).unwrap();
    let certificate = |authority: &Authority| authority.certificate(SystemTime::now()).unwrap();
    let (old, new) = (certificate(&site.authority), certificate(&next));
    // Files are looked at every half second; each step is given to both sides before the next.
    let settle = async || {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(1200) {
            look(&client).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    replace(&site.path("authority.pem"), &format!("{old}{new}"));
    settle().await;
    renew(&next, &of_server, Role::Monitor, hour);
    settle().await;
    renew(&next, &own, Role::Deployer, hour);
    settle().await;
    look(&site.client(Some(&stranger), None)).await.unwrap();
    replace(&site.path("authority.pem"), &new);
    settle().await;
    // What the old one signed is good no more.
    assert!(look(&site.client(Some(&stranger), None)).await.is_err());
    site.stop().await;
}
