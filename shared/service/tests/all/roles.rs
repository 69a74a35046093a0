//! Every method and every role, over the real layer.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_service::access::{METRICS, Role, TABLE, row};
use kiln_service::client;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use crate::site::{Site, in_an_hour, token};

/// The methods of everything that a service can have: the protocol's own, health and reflection.
fn methods() -> BTreeSet<String> {
    let sets = [
        kiln_api::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    ];
    let mut methods = BTreeSet::new();
    for set in sets {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                let name = format!("/{}.{}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| format!("{name}/{}", method.name())));
            }
        }
    }
    methods
}

/// An empty message; nobody waits for the answer of what never ends.
async fn call(channel: &client::Channel, method: &str) -> Option<Code> {
    let path: PathAndQuery = method.parse().unwrap();
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let mut request = Request::new(());
    request.set_timeout(Duration::from_millis(200));
    let codec = ProstCodec::<(), ()>::default();
    client.server_streaming(request, path, codec).await.err().map(|status| status.code())
}

#[test]
fn every_method_has_a_row_and_every_row_a_method() {
    let methods = methods();
    assert!(methods.len() > 40, "{methods:?}");
    let missing: Vec<_> = methods.iter().filter(|method| row(method).is_none()).collect();
    assert!(missing.is_empty(), "no role may call {missing:?}: give each a row in access/table.rs");
    let rows = TABLE.iter().map(|row| row.method).filter(|method| *method != METRICS);
    let idle: Vec<_> = rows.filter(|method| !methods.contains(*method)).collect();
    assert!(idle.is_empty(), "rows of no method: {idle:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pair_of_method_and_role_is_as_the_table_says() {
    let site = Site::start().await;
    let (mut let_in, mut refused) = (0, 0);
    let unknown = ["/kiln.builder.v1.BuilderService/Nothing".to_owned(), "/x".to_owned()];
    for role in Role::ALL {
        let certificate = site.certificate(role);
        let channel = site.channel(Some(&certificate), None);
        for method in methods().iter().chain(&unknown) {
            let code = call(&channel, method).await;
            // Worked out from the row's own words, not by the code that the layer asks.
            let people = [Role::Viewer, Role::Operator, Role::Admin];
            let takes = row(method).is_some_and(|row| match people.iter().position(|it| *it == role) {
                Some(rank) => row.people.is_some_and(|least| people[..=rank].contains(&least)),
                None => row.services.contains(&role),
            });
            if takes {
                let_in += 1;
                let out = [Some(Code::PermissionDenied), Some(Code::Unauthenticated)].contains(&code);
                assert!(!out, "{role} was refused {method}");
            } else {
                refused += 1;
                assert_eq!(code, Some(Code::PermissionDenied), "{role} was let to {method}");
            }
        }
    }
    assert!(let_in > 150 && refused > 150, "{let_in} {refused}");
    // Whoever shows nothing is refused everything, health as well; whoever gets to the Unix socket nothing.
    site.keep(&[&token(1, Role::Viewer, &in_an_hour()).1]);
    let methods: Vec<_> = methods().into_iter().collect();
    // A connection is kept for no more than a few refused calls.
    for some in methods.chunks(9) {
        let nobody = site.channel(None, None);
        for method in some {
            assert_eq!(call(&nobody, method).await, Some(Code::Unauthenticated), "{method}");
        }
    }
    let local = client::channel(&site.running.socket());
    for method in &methods {
        let code = call(&local, method).await;
        assert!(![Some(Code::PermissionDenied), Some(Code::Unauthenticated)].contains(&code), "{method}");
    }
    for method in &unknown {
        assert_eq!(call(&local, method).await, Some(Code::PermissionDenied), "{method}");
    }
    site.stop().await;
}

/// What changes something, or has something done, and who may: said again here, so that a slip in the table shows.
const MAY: [(Role, &[&str]); 9] = [
    (Role::Builder, &["engine/Launch", "engine/Retire", "engine/Check"]),
    (
        Role::Deployer,
        &["builder/Hold", "engine/Launch", "engine/Retire", "engine/Route", "engine/Check", "engine/Verify"],
    ),
    (Role::Monitor, &["builder/InspectSource", "builder/Plan", "engine/Check"]),
    (Role::Node, &[]),
    (Role::Console, &[]),
    (Role::Broker, &[]),
    (Role::Viewer, &[]),
    (Role::Operator, &OPERATOR),
    (Role::Admin, &ADMIN),
];
const OPERATOR: [&str; 10] = [
    "builder/Apply",
    "builder/Build",
    "builder/CancelBuild",
    "builder/Collect",
    "builder/InspectSource",
    "builder/Plan",
    "deployer/AbortRollout",
    "deployer/Rollback",
    "monitor/ApproveSignal",
    "monitor/ReportSignal",
];
const ADMIN: [&str; 11] = [
    "builder/Apply",
    "builder/Build",
    "builder/CancelBuild",
    "builder/Collect",
    "builder/InspectSource",
    "builder/Plan",
    "builder/Remove",
    "deployer/AbortRollout",
    "deployer/Rollback",
    "monitor/ApproveSignal",
    "monitor/ReportSignal",
];

/// Methods whose names say that they change nothing.
fn only_looks(method: &str) -> bool {
    let name = method.rsplit('/').next().unwrap_or_default();
    let looks =
        ["Get", "List", "Watch", "Export", "Read", "Compare"].iter().any(|word| name.starts_with(word));
    looks || ["engine/Logs", "audit/CheckSeals"].contains(&method)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_changes_anything_but_who_may() {
    let site = Site::start().await;
    let methods: Vec<(String, String)> = methods()
        .into_iter()
        .filter_map(|path| {
            let short = path.strip_prefix("/kiln.")?.replace(".v1.", "/");
            let (package, rest) = short.split_once('/')?;
            Some((format!("{package}/{}", rest.split_once('/')?.1), path))
        })
        .filter(|(short, _)| !only_looks(short))
        .collect();
    assert_eq!(MAY.map(|(role, _)| role), Role::ALL);
    let all: BTreeSet<_> = MAY.iter().flat_map(|(_, may)| *may).copied().collect();
    let named: BTreeSet<_> = methods.iter().map(|(short, _)| short.as_str()).collect();
    assert_eq!(named, all, "say who may call what is new");
    for (role, may) in MAY {
        let certificate = site.certificate(role);
        let channel = site.channel(Some(&certificate), None);
        let mut let_in = BTreeSet::new();
        for (short, path) in &methods {
            if call(&channel, path).await != Some(Code::PermissionDenied) {
                let_in.insert(short.as_str());
            }
        }
        assert_eq!(let_in, may.iter().copied().collect(), "{role}");
    }
    site.stop().await;
}

/// An id makes a call one that can be repeated: only what changes something needs it.
#[test]
fn what_changes_something_is_what_has_an_id() {
    let mut with_id = BTreeSet::new();
    for file in FileDescriptorSet::decode(kiln_api::FILE_DESCRIPTOR_SET).unwrap().file {
        let has_id = |input: &str| {
            let name = input.rsplit('.').next().unwrap_or_default();
            let request = file.message_type.iter().find(|message| message.name() == name).unwrap();
            request.field.iter().any(|field| field.name() == "request_id")
        };
        for service in &file.service {
            let asked = service.method.iter().filter(|method| has_id(method.input_type()));
            with_id.extend(asked.map(|it| format!("/{}.{}/{}", file.package(), service.name(), it.name())));
        }
    }
    assert!(with_id.len() > 10, "{with_id:?}");
    let changes: BTreeSet<_> =
        TABLE.iter().filter(|row| row.changes).map(|row| row.method.to_owned()).collect();
    assert_eq!(changes, with_id);
}

/// The table in the documentation is this one.
#[test]
fn the_documented_table_is_the_one_in_force() {
    let mut text = String::from("| method | people | services |\n|---|---|---|\n");
    for row in TABLE {
        let least = row.people.map_or_else(|| "nobody".to_owned(), |role| role.to_string());
        let services: Vec<_> = row.services.iter().map(|role| role.as_str()).collect();
        let method = row.method.trim_start_matches('/');
        text.push_str(&format!("| `{method}` | {least} | {} |\n", services.join(", ")));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/security.md");
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains(&text), "put this into deploy/security.md:\n{text}");
}
