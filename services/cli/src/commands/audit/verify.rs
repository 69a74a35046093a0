//! `kiln audit verify`

use std::path::PathBuf;

use clap::Args;
use kiln_api::audit::{
    CheckSealsRequest, CheckSealsResponse, Fault, FaultKind, Link, ListRecordsRequest, Record,
};
use kiln_api::events::AuditSealed;
use kiln_bus::{NatsBus, User};
use kiln_model::event::{EventType, Service};
use kiln_service::audit::{checked, message};
use kiln_store::seal;
use prost::Message as _;
use serde_json::json;

use super::kept::KeptHead;
use super::{Keeper, SERVICES, as_json};
use crate::clients::{Services, look};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::{Screen, bad, good, plain};
use crate::site::ledger::{self, Log};
use crate::words::{moment, short};

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Compare with a head that was kept elsewhere, as an earlier `kiln audit verify` printed it; can be given for each
    /// service and for the site's own records
    #[arg(long = "head", value_name = "SERVICE=SEQUENCE:HASH")]
    heads: Vec<KeptHead>,
}

/// A head that the chain must have.
#[derive(Debug, Clone)]
struct Head {
    link: Link,
    from: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    /// When it was published.
    Broker(String),
    /// Whoever calls kept it.
    Caller,
}

impl Origin {
    fn absent(&self) -> String {
        match self {
            Self::Broker(time) => format!("is not there, and was published as sealed at {time}"),
            Self::Caller => "is not there, and was sealed when its head was kept".to_owned(),
        }
    }

    fn other(&self, until: u64) -> String {
        match self {
            Self::Broker(time) => {
                format!("or a later one up to {until} is not as it was published at {time}")
            }
            Self::Caller => format!("or a later one up to {until} is not as in the head that was kept"),
        }
    }
}

/// What was found of one chain.
struct Found {
    keeper: Keeper,
    records: u64,
    unsealed: u64,
    /// Heads of the broker that were compared with.
    published: usize,
    /// Heads of the caller, likewise.
    kept: usize,
    reached: Link,
    fault: Option<(u64, String)>,
}

impl Found {
    fn count(&mut self, head: &Head) {
        match head.from {
            Origin::Broker(_) => self.published += 1,
            Origin::Caller => self.kept += 1,
        }
    }

    /// The head, for `--head`; none of a chain that does not fit.
    fn keep(&self) -> Option<String> {
        let head = KeptHead { keeper: self.keeper, link: self.reached.clone() };
        self.fault.is_none().then(|| head.to_string())
    }

    /// Whether a chain that was written anew as a whole would have been found. One that never had a record has no head.
    fn is_compared(&self, broker_answered: bool) -> bool {
        let is_empty = self.reached.sequence == 0;
        // Of who publishes none, to ask for a head that was kept each time would only teach people to overlook the exit code.
        // It is said instead.
        !self.keeper.publishes() || self.kept > 0 || broker_answered && (is_empty || self.published > 0)
    }
}

pub(super) async fn run(it: &Verify, services: &Services, screen: Screen) -> Outcome {
    let published = published(services).await;
    let mut found = Vec::new();
    for (place, service) in SERVICES.into_iter().enumerate() {
        let published = published.as_ref().map(|all| all[place].clone()).unwrap_or_default();
        let keeper = Keeper::Service(service);
        found.push(check(services, keeper, &with_kept(published, keeper, &it.heads)).await?);
    }
    let kept = with_kept(Vec::new(), Keeper::Site, &it.heads);
    // From another machine it can't be looked at, which is only wrong where it was asked for.
    if services.site_here().is_some() || !kept.is_empty() {
        found.push(check(services, Keeper::Site, &kept).await?);
    }
    let not_compared = published.err().map(|failure| failure.line());
    tell(services, &found, not_compared.as_deref(), screen).await?;
    if found.iter().any(|found| found.fault.is_some()) {
        return Err(Failure::Shown(Code::Failed));
    }
    compared(&found, not_compared.is_none())
}

/// That records fit each other proves little: the whole chain could have been written anew.
fn compared(found: &[Found], broker_answered: bool) -> Outcome {
    let left = found.iter().filter(|found| !found.is_compared(broker_answered));
    let left: Vec<_> = left.map(|found| found.keeper.as_str()).collect();
    if left.is_empty() {
        return Ok(());
    }
    let why = format!(
        "there was nothing to compare those of {} with: they fit each other, as they would if somebody had written all of \
         them anew",
        left.join(", ")
    );
    let todo = "kiln up, where the broker does not run; else compare with heads that were kept: kiln audit verify --head \
                SERVICE=SEQUENCE:HASH";
    Err(Failure::new(Code::Unavailable, "verifying the audit records", why).reason("not_compared").todo(todo))
}

/// All heads of a chain, in its order.
fn with_kept(mut published: Vec<Head>, keeper: Keeper, kept: &[KeptHead]) -> Vec<Head> {
    let kept = kept.iter().filter(|kept| kept.keeper == keeper);
    published.extend(kept.map(|kept| Head { link: kept.link.clone(), from: Origin::Caller }));
    published.sort_by_key(|head| head.link.sequence);
    published
}

/// The heads that the broker still has of each service.
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
        if !Keeper::Service(service).publishes() {
            all.push(Vec::new());
            continue;
        }
        let events = bus.all_of(&EventType::new(service, "audit", "sealed"), None).await;
        let mut heads = Vec::new();
        for event in events.map_err(|error| away(&error))? {
            let event = event.map_err(|error| away(&error))?;
            let sealed = AuditSealed::decode(event.event.payload.as_slice()).map_err(|error| away(&error))?;
            let published = moment(Some(&kiln_api::convert::to_timestamp(event.event.time)));
            heads.extend(sealed.head.map(|link| Head { link, from: Origin::Broker(published) }));
        }
        all.push(heads);
    }
    Ok(all)
}

async fn check(services: &Services, keeper: Keeper, heads: &[Head]) -> Outcome<Found> {
    let mut found = Found {
        keeper,
        records: 0,
        unsealed: 0,
        published: 0,
        kept: 0,
        reached: Link::default(),
        fault: None,
    };
    let mut from = None;
    for head in heads.iter().map(Some).chain([None]) {
        let until = head.map_or(0, |head| head.link.sequence);
        let trusted = found.reached.sequence;
        // Kept before the first record: any chain goes on from there, and the service takes 0 for all that there are.
        if let Some(head) = head.filter(|head| head.link.sequence == 0) {
            found.count(head);
            continue;
        }
        loop {
            let answer = ask(services, keeper, from.clone(), until).await?;
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
            found.fault = Some((head.link.sequence, head.from.absent()));
            return Ok(found);
        }
        if found.reached.hash != head.link.hash {
            // Of two heads of one place, the second contradicts what was trusted by the first.
            let first = (trusted + 1).min(head.link.sequence);
            found.fault = Some((first, head.from.other(head.link.sequence)));
            return Ok(found);
        }
        found.count(head);
    }
    Ok(found)
}

/// One look at the records after a link, up to a sequence (0 for all).
async fn ask(
    services: &Services,
    keeper: Keeper,
    from: Option<Link>,
    until: u64,
) -> Outcome<CheckSealsResponse> {
    let what = format!("checking the audit records of the {}", keeper.as_str());
    match keeper {
        Keeper::Service(service) => {
            let mut client = services.audit(service);
            let asked = look(client.check_seals(CheckSealsRequest { from, until })).await;
            Ok(asked.during(what)?.into_inner())
        }
        Keeper::Site => {
            let from = match from {
                None => seal::Link::start(),
                Some(from) => {
                    let hash =
                        from.hash.parse().map_err(|error| Failure::new(Code::Invalid, &what, error))?;
                    seal::Link { sequence: from.sequence, hash }
                }
            };
            let log = Log::read(services.site(&what)?)?;
            Ok(checked(&log.check(from, until)?, ""))
        }
    }
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
    let (mut told, mut of_site) = (Vec::new(), None);
    let mut rows = Vec::new();
    for found in found {
        let record = match &found.fault {
            Some((sequence, _)) => record(services, found.keeper, *sequence).await?,
            None => None,
        };
        let document = json!({
            "service": found.keeper.as_str(),
            "fits": found.fault.is_none(),
            "records": found.records,
            "not_sealed_yet": found.unsealed,
            "published_heads": found.published,
            "kept_heads": found.kept,
            "head": { "sequence": found.reached.sequence, "hash": found.reached.hash },
            "keep": found.keep(),
            "first_fault": found.fault.as_ref().map(|(sequence, why)| json!({
                "sequence": sequence, "why": why, "record": record,
            })),
        });
        match found.keeper {
            Keeper::Service(_) => told.push(document),
            Keeper::Site => of_site = Some(document),
        }
        let result = match &found.fault {
            None => good("fits"),
            Some((sequence, why)) => bad(format!("record {sequence} {why}")),
        };
        rows.push(vec![
            plain(found.keeper.as_str()),
            plain(found.records),
            plain(found.unsealed),
            plain(found.published),
            plain(found.kept),
            plain(format!("{} {}", found.reached.sequence, short(&found.reached.hash))),
            result,
        ]);
    }
    let torn = torn(services)?;
    screen.json(&json!({ "services": told, "site": of_site, "torn": torn, "not_compared": not_compared }))?;
    screen.table(&["SERVICE", "RECORDS", "NOT SEALED YET", "PUBLISHED", "KEPT", "UP TO", "RESULT"], rows)?;
    if let Some(torn) = &torn {
        screen.line(format_args!(
            "\nThe last line of {} was cut off in a crash, before anything was done that it told of. The next command that \
             writes there takes it away, and records that",
            torn.display()
        ))?;
    }
    if let Some(why) = not_compared {
        screen.line(format_args!("\nNot compared with what was published: {why}"))?;
    }
    let alone = found.iter().filter(|it| !it.keeper.publishes() && it.kept == 0 && it.records > 0);
    let alone: Vec<_> = alone.map(|it| it.keeper.as_str()).collect();
    if !alone.is_empty() {
        screen.line(format_args!(
            "\nThe records of the {} were compared with nothing: they fit each other, as they would if somebody had written all \
             of them anew. Nobody publishes their heads: keep one elsewhere",
            alone.join(" and the ")
        ))?;
    }
    let keep: Vec<_> = found.iter().filter_map(Found::keep).collect();
    if !keep.is_empty() {
        screen.line("\nTo be kept elsewhere, and compared with by the next `kiln audit verify`:")?;
    }
    for head in keep {
        screen.line(format_args!("  --head {head}"))?;
    }
    Ok(())
}

/// The site's log, where a crash left a part of a record at its end.
fn torn(services: &Services) -> Outcome<Option<PathBuf>> {
    let Some(site) = services.site_here() else { return Ok(None) };
    Ok(Log::read(site)?.is_torn.then(|| ledger::path(site)))
}

/// The record that does not fit, where it is there.
async fn record(services: &Services, keeper: Keeper, sequence: u64) -> Outcome<Option<serde_json::Value>> {
    let found = match keeper {
        Keeper::Service(service) => record_of(services, service, sequence).await?,
        Keeper::Site => {
            let log = Log::read(services.site("reading a record")?)?;
            let found = log.records().find(|(at, _)| *at == sequence);
            found.map(|(at, record)| message(keeper.as_str(), at, record.clone()))
        }
    };
    found.as_ref().map(as_json).transpose()
}

async fn record_of(services: &Services, service: Service, sequence: u64) -> Outcome<Option<Record>> {
    let request = ListRecordsRequest {
        before: sequence.saturating_add(1),
        page_size: 1,
        ..ListRecordsRequest::default()
    };
    let page = look(services.audit(service).list_records(request)).await;
    let page = page.during(format_args!("asking the {service} for a record"))?.into_inner();
    Ok(page.records.into_iter().find(|record| record.sequence == sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(published: usize, kept: usize, sequence: u64) -> Found {
        Found {
            keeper: Keeper::Service(Service::Builder),
            records: sequence,
            unsealed: 0,
            published,
            kept,
            reached: Link { sequence, hash: String::new() },
            fault: None,
        }
    }

    #[test]
    fn records_that_were_compared_with_nothing_are_not_verified() {
        for (broker_answered, found, is_verified) in [
            (true, chain(1, 0, 9), true),
            (true, chain(0, 0, 0), true),
            (true, chain(0, 1, 9), true),
            (false, chain(0, 1, 9), true),
            (false, chain(0, 1, 0), true),
            // The broker's data were wiped, or it was stopped.
            (true, chain(0, 0, 9), false),
            (false, chain(0, 0, 9), false),
            // As if all of them had been removed.
            (false, chain(0, 0, 0), false),
        ] {
            let outcome = compared(&[found], broker_answered);
            assert_eq!(outcome.is_ok(), is_verified, "{outcome:?}");
            if let Err(failure) = outcome {
                assert!(
                    failure.is_unavailable() && failure.line().contains("those of builder"),
                    "{failure:?}"
                );
            }
        }
    }

    #[test]
    fn what_nobody_publishes_needs_no_head() {
        for (keeper, kept) in [(Keeper::Site, 0), (Keeper::Site, 1), (Keeper::Service(Service::Node), 0)] {
            let own = || Found { keeper, ..chain(0, kept, 9) };
            assert!(compared(&[chain(1, 0, 9), own()], true).is_ok());
            let failure = compared(&[chain(0, 0, 9), own()], true).unwrap_err();
            assert!(failure.line().contains("those of builder with"), "{failure:?}");
        }
    }

    #[test]
    fn kept_heads_are_compared_with_in_the_order_of_the_chain() {
        let of = |sequence| Link { sequence, hash: String::new() };
        let published =
            [7, 3].map(|sequence| Head { link: of(sequence), from: Origin::Broker(String::new()) }).to_vec();
        let [builder, monitor] = [Service::Builder, Service::Monitor].map(Keeper::Service);
        let kept = [(builder, 5), (monitor, 4), (Keeper::Site, 6), (builder, 0)]
            .map(|(keeper, sequence)| KeptHead { keeper, link: of(sequence) });
        let heads = with_kept(published, builder, &kept);
        let order: Vec<_> =
            heads.iter().map(|it| (it.link.sequence, matches!(it.from, Origin::Caller))).collect();
        assert_eq!(order, [(0, true), (3, false), (5, true), (7, false)]);
    }
}
