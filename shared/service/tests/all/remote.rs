//! Who is let in at a TCP port, and who a client lets itself be answered by.

use std::time::{Duration, Instant, SystemTime};

use kiln_api::monitor::ListHealthRequest;
use kiln_service::access::{Identity, Role, Secret};
use kiln_service::error::describe;
use kiln_service::pki::Authority;
use kiln_service::server::{Limits, ServerOptions, serve};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status};

use crate::monitor::{Client, options, report};
use crate::site::{LOCALHOST, Site, connect, free_port, identity, in_an_hour, replace, site_name, token};

const HOUR: Duration = Duration::from_secs(3600);

async fn look(mut client: Client) -> Result<(), Status> {
    client.list_health(ListHealthRequest::default()).await.map(drop)
}

/// All that is known of why, with the causes that a status keeps to itself.
fn why(status: &Status) -> String {
    kiln_service::error::chain(status)
}

#[tokio::test]
async fn the_actor_is_whoever_connected() {
    let site = Site::start().await;
    let reporter = async |mut client: Client, id| {
        let answer = client.report_signal(report(id)).await.unwrap();
        answer.into_inner().signal.unwrap().reporter
    };
    assert_eq!(reporter(site.as_role(Role::Operator), "r1").await, "ada");
    let own = reporter(site.running.client(), "r2").await;
    assert!(!own.is_empty() && own != "ada", "{own}");
    // A name that a caller sends along is only a header.
    let mut request = tonic::Request::new(report("r3"));
    request.metadata_mut().insert("actor", "eve".parse().unwrap());
    request
        .metadata_mut()
        .insert("x-forwarded-client-cert", "URI=spiffe://home/person/eve/admin".parse().unwrap());
    let answer = site.as_role(Role::Operator).report_signal(request).await.unwrap();
    assert_eq!(answer.into_inner().signal.unwrap().reporter, "ada");
    site.stop().await;
}

/// One replica of three is away, and one stands still: its kernel takes connections, and it says nothing on them.
#[tokio::test]
async fn of_several_replicas_the_first_that_answers_is_called() {
    let site = Site::start().await;
    let frozen = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let others = format!("https://{},https://{}", free_port(), frozen.local_addr().unwrap());
    let ada = site.certificate(Role::Viewer);
    let client = |addresses: &str| Client::new(site.channel_to(addresses, Some(&ada), None));
    look(client(&format!("{others},https://{}", site.address))).await.unwrap();
    let status = look(client(&others)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{}", why(&status));
    site.stop().await;
}

#[tokio::test]
async fn a_certificate_that_is_not_of_this_site_or_time_is_refused() {
    let site = Site::start().await;
    let ada = identity(Role::Admin);
    let now = SystemTime::now();
    for (path, what) in [
        (site.issue(&ada, now - 2 * HOUR, HOUR), "expired"),
        (site.issue(&ada, now + HOUR, HOUR), "not yet good"),
        (
            {
                let path = site.path("stranger.pem");
                let stranger = Authority::new(site_name()).unwrap();
                replace(&path, &stranger.issue(&ada, &[], HOUR, now).unwrap().reveal());
                path
            },
            "another authority's",
        ),
    ] {
        let status = look(site.client(Some(&path), None)).await.unwrap_err();
        assert!(why(&status).contains("received fatal alert"), "{what}: {}", why(&status));
        look(site.as_role(Role::Viewer)).await.unwrap();
    }
    site.stop().await;
}

/// As the authority would sign it if it were tricked or changed: the names decide all the same.
fn odd_certificate(site: &Site, uris: &[&str]) -> String {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let mut issuer = CertificateParams::default();
    issuer.distinguished_name = rcgen::DistinguishedName::new();
    let name = site.authority.name();
    issuer.distinguished_name.push(DnType::CommonName, name.strip_prefix("CN=").unwrap());
    let signer = KeyPair::from_pem(&site.authority.reveal_key()).unwrap();
    let signed = params.signed_by(&key, &Issuer::new(issuer, signer)).unwrap();
    format!("{}{}", signed.pem(), key.serialize_pem())
}

#[tokio::test]
async fn a_certificate_that_names_nobody_is_refused_with_words() {
    let site = Site::start().await;
    let path = site.path("odd.pem");
    for (uris, words) in [
        (&["spiffe://other/person/ada/admin"][..], "another site"),
        (&["spiffe://home/person/ada/god"], "no role"),
        (&["spiffe://home/service/admin"], "no service"),
        (&["https://home/"], "is no `spiffe://"),
        (&[], "0 URI names"),
        (&["spiffe://home/person/ada/viewer", "spiffe://home/person/ada/admin"], "2 URI names"),
    ] {
        replace(&path, &odd_certificate(&site, uris));
        let status = look(site.client(Some(&path), None)).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{uris:?}: {}", why(&status));
        assert!(status.message().contains(words), "{uris:?}: {status}");
    }
    replace(&path, &odd_certificate(&site, &["spiffe://home/person/ada/viewer"]));
    look(site.client(Some(&path), None)).await.unwrap();
    site.stop().await;
}

#[tokio::test]
async fn a_good_certificate_with_the_wrong_role_is_told_which_would_do() {
    let site = Site::start().await;
    let status = site.as_role(Role::Viewer).report_signal(report("r1")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let text = describe(&status);
    for part in
        ["ada (viewer, by certificate)", "MonitorService/ReportSignal", "operator and up", "ask an admin"]
    {
        assert!(text.contains(part), "no {part} in: {text}");
    }
    let status = look(site.as_role(Role::Node)).await.unwrap_err();
    assert!(status.message().contains("node (node, by certificate)"), "{status}");
    site.stop().await;
}

#[tokio::test]
async fn a_token_is_good_until_it_expires_or_is_revoked() {
    let site = Site::start().await;
    let far = in_an_hour();
    let (viewer, of_viewer) = token(1, Role::Viewer, &far);
    let (operator, of_operator) = token(2, Role::Operator, &far);
    let (late, of_late) = token(3, Role::Admin, "2026-01-02T00:00:00Z");
    let unknown = Secret::of(&[4; 32]);
    site.keep(&[&of_viewer, &of_operator, &of_late]);
    let by = |secret: &Secret| site.client(None, Some(secret.reveal()));
    look(by(&viewer)).await.unwrap();
    let answer = by(&operator).report_signal(report("r1")).await.unwrap().into_inner();
    assert_eq!(answer.signal.unwrap().reporter, "bot2");
    let status = by(&viewer).report_signal(report("r2")).await.unwrap_err();
    assert!(describe(&status).contains("bot1 (viewer, by token)"), "{status}");
    for (client, words) in [
        (by(&late), "expired"),
        (by(&unknown), "unknown or was revoked"),
        (site.client(None, Some("kiln_")), "form"),
        (site.client(None, None), "neither a client certificate nor a token"),
    ] {
        let status = look(client).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{words}");
        assert!(status.message().contains(words), "{words}: {status}");
    }
    // Also on a connection that stands.
    let standing = by(&viewer);
    look(standing.clone()).await.unwrap();
    site.keep(&[&of_operator]);
    let revoked = Instant::now();
    while look(standing.clone()).await.is_ok() {
        assert!(revoked.elapsed() < Duration::from_secs(2), "a revoked token is good still");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    look(by(&operator)).await.unwrap();
    site.stop().await;
}

#[tokio::test]
async fn a_token_beside_a_certificate_or_on_the_socket_says_nothing() {
    let site = Site::start().await;
    let (secret, kept) = token(1, Role::Admin, &in_an_hour());
    site.keep(&[&kept]);
    let viewer = site.certificate(Role::Viewer);
    let status =
        site.client(Some(&viewer), Some(secret.reveal())).report_signal(report("r1")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let mut request = tonic::Request::new(report("r2"));
    request.metadata_mut().insert("authorization", format!("Bearer {}", secret.reveal()).parse().unwrap());
    let answer = site.running.client().report_signal(request).await.unwrap().into_inner();
    assert_ne!(answer.signal.unwrap().reporter, "bot1");
    site.stop().await;
}

#[tokio::test]
async fn a_tcp_port_speaks_nothing_but_tls() {
    let site = Site::start().await;
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let requests: [&[u8]; 3] = [hello, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", &[0; 4096]];
    for address in [site.address, site.metrics] {
        for bytes in requests {
            let mut stream = connect(LOCALHOST, address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            // Closed, with nothing but an alert.
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.len() < 16 && !answer.starts_with(b"HTTP"), "{answer:?}");
        }
    }
    site.stop().await;
}

#[tokio::test]
async fn a_service_without_a_certificate_for_its_port_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let authority = Authority::new(site_name()).unwrap();
    let issued = authority.issue(&identity(Role::Monitor), &[], HOUR, SystemTime::now()).unwrap();
    let whole = issued.reveal();
    for (name, text, missing) in [
        ("nothing", "", "monitor.pem"),
        ("monitor.pem", issued.certificate.as_str(), "the key in"),
        ("monitor.pem", whole.as_str(), "authority.pem"),
        ("authority.pem", "nonsense", "no authority in"),
    ] {
        std::fs::write(path(name), text).unwrap();
        let address = free_port();
        let options = ServerOptions { listen: Some(address), ..options(folder.path()) };
        let (_stop, stopped) = tokio::sync::watch::channel(false);
        let refused =
            serve(options, tonic::service::Routes::default(), stopped).await.unwrap_err().to_string();
        for word in ["without TLS", missing, "kiln pki issue"] {
            assert!(refused.contains(word), "{word}: {refused}");
        }
        assert!(connect(LOCALHOST, address).await.is_err(), "it listens without {missing}");
    }
}

#[tokio::test]
async fn a_client_is_answered_by_none_but_the_service_it_asked_for() {
    let host = |name: &str| [name.to_owned()];
    let now = SystemTime::now();
    let monitor = identity(Role::Monitor);
    let person = Identity::person("eve".parse().unwrap(), Role::Admin).unwrap();
    for (own, hosts, from, words) in [
        (&monitor, host("other.example"), now, "not valid for name"),
        (&monitor, host("127.0.0.2"), now, "not valid for name"),
        (&monitor, host("127.0.0.1"), now - 2 * HOUR, "expired"),
        (&identity(Role::Node), host("127.0.0.1"), now, "node answers where the monitor should"),
        (&person, host("127.0.0.1"), now, "purpose"),
    ] {
        let site = Site::start_as(Limits::default(), own, &hosts, from).await;
        let status = look(site.as_role(Role::Viewer)).await.unwrap_err();
        let text = why(&status).to_lowercase();
        assert!(text.contains(words), "{words}: {text}");
        site.stop().await;
    }
    // Another authority than the one that the client trusts.
    let site = Site::start().await;
    let viewer = site.certificate(Role::Viewer);
    let other = Authority::new(site_name()).unwrap().certificate(now).unwrap();
    replace(&site.path("authority.pem"), &other);
    let status = look(site.client(Some(&viewer), None)).await.unwrap_err();
    assert!(why(&status).contains("UnknownIssuer"), "{}", why(&status));
    site.stop().await;
}

#[tokio::test]
async fn metrics_are_for_those_who_may_look() {
    let site = Site::start().await;
    site.keep(&[&token(1, Role::Viewer, &in_an_hour()).1]);
    look(site.running.client()).await.unwrap();
    let page = async |role: Option<Role>, path: &str| {
        let identity = role.map(|role| site.certificate(role));
        let stream = site.tls(site.metrics, identity.as_deref(), b"http/1.1", LOCALHOST).await;
        let mut stream = stream.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let shown = page(Some(Role::Viewer), "/metrics").await;
    assert!(shown.starts_with("HTTP/1.1 200") && shown.contains("kiln_grpc_calls_total"), "{shown}");
    assert!(page(Some(Role::Viewer), "/").await.starts_with("HTTP/1.1 404"));
    let refused = page(Some(Role::Node), "/metrics").await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("viewer and up"), "{refused}");
    let refused = page(None, "/metrics").await;
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("neither"), "{refused}");
    site.stop().await;
}
