//! `kiln audit`

mod kept;
mod verify;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use kiln_api::audit::{ListRecordsRequest, ListRecordsResponse, Record};
use kiln_model::event::Service;
use kiln_service::audit::message;
use kiln_service::config::lifetime;
use kiln_store::AuditRecord;
use serde_json::{Value, json};

use crate::clients::{Services, look, or_away};
use crate::failure::{During as _, Failure, Outcome};
use crate::screen::{Screen, plain};
use crate::site::ledger::{self, Log};
use crate::words::{moment, or_dash, plural, timestamp};

/// Services that keep audit records, each in its own store.
const SERVICES: [Service; 4] = [Service::Builder, Service::Deployer, Service::Monitor, Service::Node];

/// Who keeps records, in a chain of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    Service(Service),
    /// The site's folder: of what commands did without a service.
    Site,
}

impl Keeper {
    const ALL: [Self; 5] = [
        Self::Service(Service::Builder),
        Self::Service(Service::Deployer),
        Self::Service(Service::Monitor),
        Self::Service(Service::Node),
        Self::Site,
    ];

    /// Whether each new head goes out as an event. Commands run without a broker as well.
    const fn publishes(self) -> bool {
        match self {
            Self::Service(service) => service.has_broker(),
            Self::Site => false,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Service(service) => service.as_str(),
            Self::Site => "site",
        }
    }
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Audit {
    #[command(subcommand)]
    command: Option<AuditCommand>,
    /// Records of one server
    #[arg(long, value_name = "NAME")]
    server: Option<String>,
    /// Records of what one person or service did
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Records of that time, such as 2h or 30d
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    since: Option<std::time::Duration>,
    /// Show the last records; 0 for all
    #[arg(short = 'n', long, value_name = "RECORDS", default_value = "30")]
    limit: usize,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Check that no record was altered, removed, added or moved since it was written; exit code 1 where one was, and 5
    /// where there was nothing to compare the records with
    Verify(verify::Verify),
}

pub(crate) async fn run(it: &Audit, services: &Services, screen: Screen) -> Outcome {
    match &it.command {
        Some(AuditCommand::Verify(it)) => verify::run(it, services, screen).await,
        None => list(it, services, screen).await,
    }
}

async fn list(it: &Audit, services: &Services, screen: Screen) -> Outcome {
    let since = it.since.and_then(|since| Timestamp::now().checked_sub(since).ok());
    let wanted = if it.limit == 0 { usize::MAX } else { it.limit };
    let request = ListRecordsRequest {
        page_size: u32::try_from(wanted).unwrap_or(500).min(500),
        server: it.server.clone().unwrap_or_default(),
        actor: it.actor.clone().unwrap_or_default(),
        since: since.map(kiln_api::convert::to_timestamp),
        ..ListRecordsRequest::default()
    };
    let (mut records, mut away) = (Vec::new(), Vec::new());
    for service in SERVICES {
        let found = records_of(services, service, &request, wanted).await;
        records.extend(or_away(found, service.as_str(), &mut away)?);
    }
    // What is in the folder is about no server.
    if let Some(site) = services.site_here()
        && it.server.is_none()
    {
        let log = Log::read(site)?;
        let is_asked = |record: &AuditRecord| {
            since.is_none_or(|since| record.time >= since)
                && it.actor.as_ref().is_none_or(|name| ledger::is_by(record, name))
        };
        let asked = log.records().filter(|(_, record)| is_asked(record)).take(wanted);
        records.extend(asked.map(|(sequence, it)| message(Keeper::Site.as_str(), sequence, it.clone())));
    }
    // Of one service they stay in their order, also where the clock was set back.
    records.sort_by_key(|record| timestamp(record.time.as_ref()));
    let skipped = records.len().saturating_sub(wanted);
    let records = records.split_off(skipped);
    if screen.is_json() {
        let records = records.iter().map(as_json).collect::<Outcome<Vec<_>>>()?;
        return screen.json(&json!({ "records": records, "away": away }));
    }
    let rows = records.iter().map(|record| {
        let change = match record.before_json.as_str() {
            "null" => shortened(&record.after_json),
            before => format!("{} -> {}", shortened(before), shortened(&record.after_json)),
        };
        vec![
            plain(moment(record.time.as_ref())),
            plain(&record.actor),
            plain(&record.action),
            plain(&record.subject),
            plain(or_dash(&record.request_id)),
            plain(change),
        ]
    });
    screen.table(&["TIME", "ACTOR", "ACTION", "SUBJECT", "REQUEST", "CHANGE"], rows.collect())?;
    if records.len() == wanted {
        screen.line(format_args!("\nThe last {}; more with -n", plural(wanted, "record")))?;
    }
    if !away.is_empty() {
        screen.line(format_args!("\nNot running: {}. Its records are left out.", away.join(", ")))?;
        return screen.next(&["kiln up"]);
    }
    Ok(())
}

/// The newest records of a service, at most `wanted`.
async fn records_of(
    services: &Services,
    service: Service,
    request: &ListRecordsRequest,
    wanted: usize,
) -> Outcome<Vec<Record>> {
    let mut client = services.audit(service);
    let (mut found, mut before) = (Vec::new(), 0);
    loop {
        let request = ListRecordsRequest { before, ..request.clone() };
        let page = look(client.list_records(request))
            .await
            .during(format_args!("listing the audit records of the {service}"))?;
        let ListRecordsResponse { records, next_before } = page.into_inner();
        found.extend(records);
        before = next_before;
        if before == 0 || found.len() >= wanted {
            found.truncate(wanted);
            return Ok(found);
        }
    }
}

fn as_json(record: &Record) -> Outcome<Value> {
    let mut value = crate::json::of("kiln.audit.v1.Record", record)?;
    for (field, from) in [("before", "before_json"), ("after", "after_json")] {
        if let Some(object) = value.as_object_mut()
            && let Some(Value::String(text)) = object.remove(from)
        {
            let parsed = serde_json::from_str(&text)
                .map_err(|error| Failure::failed("reading an audit record", error))?;
            object.insert(field.to_owned(), parsed);
        }
    }
    Ok(value)
}

/// Enough for a line; `--output json` has all of it.
fn shortened(json: &str) -> String {
    const LENGTH: usize = 80;
    match json.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", json.get(..end).unwrap_or_default()),
        None => json.to_owned(),
    }
}
