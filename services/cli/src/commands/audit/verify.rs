//! `kiln audit verify`

use kiln_api::audit::{CheckSealsRequest, Fault, FaultKind, Link, ListRecordsRequest};
use kiln_api::events::AuditSealed;
use kiln_bus::{NatsBus, User};
use kiln_model::event::{EventType, Service};
use prost::Message as _;
use serde_json::json;

use super::{SERVICES, as_json};
use crate::clients::{Services, look};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::{Screen, bad, good, plain};
use crate::words::{moment, short};

/// A head as it was published.
struct Head {
    link: Link,
    published: String,
}

/// What was found of one service.
struct Found {
    service: Service,
    records: u64,
    unsealed: u64,
    /// Heads that were compared with.
    heads: usize,
    reached: Link,
    fault: Option<(u64, String)>,
}

pub(super) async fn run(services: &Services, screen: Screen) -> Outcome {
    let published = published(services).await;
    let mut found = Vec::new();
    for (place, service) in SERVICES.into_iter().enumerate() {
        let heads = published.as_ref().map(|all| all[place].as_slice()).unwrap_or_default();
        found.push(check(services, service, heads).await?);
    }
    let not_compared = published.err().map(|failure| failure.line());
    tell(services, &found, not_compared.as_deref(), screen).await?;
    match found.iter().find_map(|found| found.fault.as_ref()) {
        None => Ok(()),
        Some(_) => Err(Failure::Shown(Code::Failed)),
    }
}

/// The heads that the broker still has of each service, oldest first.
async fn published(services: &Services) -> Outcome<Vec<Vec<Head>>> {
    let site = services.site("reading what was published of the seals")?;
    let away = |error: &dyn std::fmt::Display| {
        Failure::new(Code::Unavailable, "reading what was published of the seals", error)
    };
    let bus = NatsBus::connect(site.nats(User::Cli).map_err(|error| away(&error))?);
    let bus = bus.await.map_err(|error| away(&error))?;
    if !bus.connected() {
        return Err(away(&format!("{}, at {}", bus.away(), site.nats_url)));
    }
    let mut all = Vec::new();
    for service in SERVICES {
        let events = bus.all_of(&EventType::new(service, "audit", "sealed"), None).await;
        let mut heads = Vec::new();
        for event in events.map_err(|error| away(&error))? {
            let event = event.map_err(|error| away(&error))?;
            let sealed = AuditSealed::decode(event.event.payload.as_slice()).map_err(|error| away(&error))?;
            let published = moment(Some(&kiln_api::convert::to_timestamp(event.event.time)));
            heads.extend(sealed.head.map(|link| Head { link, published }));
        }
        heads.sort_by_key(|head| head.link.sequence);
        all.push(heads);
    }
    Ok(all)
}

async fn check(services: &Services, service: Service, heads: &[Head]) -> Outcome<Found> {
    let mut client = services.audit(service)?;
    let mut found =
        Found { service, records: 0, unsealed: 0, heads: 0, reached: Link::default(), fault: None };
    let mut from = None;
    for head in heads.iter().map(Some).chain([None]) {
        let until = head.map_or(0, |head| head.link.sequence);
        let trusted = found.reached.sequence;
        loop {
            let answer = look(client.check_seals(CheckSealsRequest { from: from.clone(), until }))
                .await
                .during(format_args!("checking the audit records of the {service}"))?
                .into_inner();
            found.records += answer.records;
            found.unsealed = answer.unsealed;
            if let Some(fault) = answer.fault {
                found.fault = Some((fault.sequence, in_words(&fault)));
                return Ok(found);
            }
            found.reached = answer.reached.clone().unwrap_or_default();
            from = answer.reached;
            if !answer.more {
                break;
            }
        }
        let Some(head) = head else { break };
        if found.reached.sequence != head.link.sequence {
            let why = format!("is not there, and was published as sealed at {}", head.published);
            found.fault = Some((head.link.sequence, why));
            return Ok(found);
        }
        if found.reached.hash != head.link.hash {
            let why = format!(
                "or a later one up to {} is not as it was published at {}",
                head.link.sequence, head.published
            );
            found.fault = Some((trusted + 1, why));
            return Ok(found);
        }
        found.heads += 1;
    }
    Ok(found)
}

fn in_words(fault: &Fault) -> String {
    match fault.kind() {
        FaultKind::Altered => "is not as it was sealed: it, its place or its seal was altered",
        FaultKind::Missing => "was sealed and is not there: it was removed",
        FaultKind::Unsealed => "is not sealed though later ones are: it was added, or its seal was removed",
        FaultKind::Unspecified => "does not fit",
    }
    .to_owned()
}

async fn tell(services: &Services, found: &[Found], not_compared: Option<&str>, screen: Screen) -> Outcome {
    let mut told = Vec::new();
    let mut rows = Vec::new();
    for found in found {
        let record = match &found.fault {
            Some((sequence, _)) => record(services, found.service, *sequence).await?,
            None => None,
        };
        told.push(json!({
            "service": found.service.as_str(),
            "fits": found.fault.is_none(),
            "records": found.records,
            "not_sealed_yet": found.unsealed,
            "published_heads": found.heads,
            "head": { "sequence": found.reached.sequence, "hash": found.reached.hash },
            "first_fault": found.fault.as_ref().map(|(sequence, why)| json!({
                "sequence": sequence, "why": why, "record": record,
            })),
        }));
        let result = match &found.fault {
            None => good("fits"),
            Some((sequence, why)) => bad(format!("record {sequence} {why}")),
        };
        rows.push(vec![
            plain(found.service),
            plain(found.records),
            plain(found.unsealed),
            plain(found.heads),
            plain(format!("{} {}", found.reached.sequence, short(&found.reached.hash))),
            result,
        ]);
    }
    screen.json(&json!({ "services": told, "not_compared": not_compared }))?;
    screen.table(&["SERVICE", "RECORDS", "NOT SEALED YET", "PUBLISHED", "UP TO", "RESULT"], rows)?;
    if let Some(why) = not_compared {
        screen.line(format_args!("\nNot compared with what was published: {why}"))?;
    }
    Ok(())
}

/// The record that does not fit, where it is there.
async fn record(services: &Services, service: Service, sequence: u64) -> Outcome<Option<serde_json::Value>> {
    let request = ListRecordsRequest {
        before: sequence.saturating_add(1),
        page_size: 1,
        ..ListRecordsRequest::default()
    };
    let page = look(services.audit(service)?.list_records(request)).await;
    let page = page.during(format_args!("asking the {service} for a record"))?.into_inner();
    page.records.iter().find(|record| record.sequence == sequence).map(as_json).transpose()
}
