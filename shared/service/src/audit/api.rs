//! The records by gRPC: the same in every service that has them.

use kiln_api::audit as wire;
use kiln_api::audit::audit_service_server::{AuditService, AuditServiceServer};
use kiln_api::audit::{
    CheckSealsRequest, CheckSealsResponse, Fault, FaultKind, ListRecordsRequest, ListRecordsResponse, Record,
};
use kiln_api::convert;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_model::name::ServerName;
use kiln_store::seal::{self, Link};
use kiln_store::{AuditRecord, PAGE_BYTES, Store};
use tonic::{Request, Response, Status};

use super::link;
use crate::error::ApiError;

/// Records read at a time, and the most that are looked through for one page.
const READ: u32 = 500;
const LOOKED_THROUGH: usize = 10_000;
const PAGE: u32 = 100;

#[derive(Debug)]
pub struct Api<S> {
    store: S,
    service: Service,
}

pub(super) fn service<S: Store>(store: S, service: Service) -> AuditServiceServer<Api<S>> {
    AuditServiceServer::new(Api { store, service })
}

struct Filter {
    server: Option<ServerName>,
    actor: String,
    since: jiff::Timestamp,
}

impl Filter {
    fn takes(&self, record: &AuditRecord) -> bool {
        record.time >= self.since
            && (self.actor.is_empty() || self.actor == record.actor)
            && (self.server.is_none() || self.server == record.server)
    }
}

impl<S: Store> Api<S> {
    async fn list(&self, request: ListRecordsRequest) -> Result<ListRecordsResponse, ApiError> {
        let since = convert::from_optional_timestamp("since", request.since)?;
        let filter = Filter {
            server: convert::optional_text("server", &request.server)?,
            actor: request.actor,
            since: since.unwrap_or(jiff::Timestamp::MIN),
        };
        let wanted = if request.page_size == 0 { PAGE } else { request.page_size.min(READ) } as usize;
        let (mut before, mut looked, mut bytes) = (request.before, 0, 0);
        let mut records = Vec::new();
        loop {
            let read = self.store.audit(before, READ).await?;
            let is_last = read.len() < READ as usize;
            // The clock may have been set back in between, by less than a page's time.
            let all_older = read.iter().all(|(_, record)| record.time < filter.since);
            for (sequence, record) in read {
                before = sequence;
                looked += 1;
                if filter.takes(&record) {
                    let record = message(self.service.as_str(), sequence, record);
                    bytes += record.before_json.len() + record.after_json.len();
                    records.push(record);
                }
                if records.len() >= wanted || bytes >= PAGE_BYTES || looked >= LOOKED_THROUGH {
                    return Ok(ListRecordsResponse { records, next_before: before });
                }
            }
            if is_last || all_older {
                return Ok(ListRecordsResponse { records, next_before: 0 });
            }
        }
    }

    async fn check(&self, request: CheckSealsRequest) -> Result<CheckSealsResponse, ApiError> {
        let from = match request.from {
            None => Link::start(),
            Some(from) => {
                let hash: Digest = convert::text("from.hash", &from.hash)?;
                Link { sequence: from.sequence, hash }
            }
        };
        Ok(checked(&seal::check(&self.store, from, request.until).await?, self.store.epoch()))
    }
}

/// What one look at a chain found, as it is answered.
pub fn checked(found: &seal::Checked, epoch: &str) -> CheckSealsResponse {
    let fault = found.fault.as_ref().map(|fault| {
        let kind = match fault.kind {
            seal::FaultKind::Altered => FaultKind::Altered,
            seal::FaultKind::Missing => FaultKind::Missing,
            seal::FaultKind::Unsealed => FaultKind::Unsealed,
        };
        Fault { sequence: fault.sequence, kind: kind.into() }
    });
    CheckSealsResponse {
        reached: Some(link(&found.reached)),
        records: found.records,
        fault,
        more: found.more,
        unsealed: found.unsealed,
        epoch: epoch.to_owned(),
    }
}

/// A record as it is answered. `keeper` is the service that wrote it, or who else did.
pub fn message(keeper: &str, sequence: u64, record: AuditRecord) -> Record {
    Record {
        sequence,
        service: keeper.to_owned(),
        time: Some(convert::to_timestamp(record.time)),
        actor: record.actor,
        action: record.action,
        subject: record.subject,
        server: record.server.map(|server| server.to_string()).unwrap_or_default(),
        request_id: record.request_id.map(|id| id.to_string()).unwrap_or_default(),
        before_json: record.before.to_string(),
        after_json: record.after.to_string(),
    }
}

#[tonic::async_trait]
impl<S: Store> AuditService for Api<S> {
    async fn list_records(
        &self,
        request: Request<ListRecordsRequest>,
    ) -> Result<Response<wire::ListRecordsResponse>, Status> {
        Ok(Response::new(self.list(request.into_inner()).await?))
    }

    async fn check_seals(
        &self,
        request: Request<CheckSealsRequest>,
    ) -> Result<Response<CheckSealsResponse>, Status> {
        Ok(Response::new(self.check(request.into_inner()).await?))
    }
}

#[cfg(test)]
mod tests {
    use kiln_store::{Batch, SqlStore};

    use super::*;

    async fn page(api: &Api<SqlStore>, request: ListRecordsRequest) -> (String, u64) {
        let page = api.list(request).await.unwrap();
        (page.records.iter().map(|record| record.subject.as_str()).collect(), page.next_before)
    }

    #[tokio::test]
    async fn records_are_given_newest_first_by_pages_and_by_what_they_are_about() {
        let store = SqlStore::in_memory().await.unwrap();
        let (web, db): (ServerName, ServerName) = ("web".parse().unwrap(), "db".parse().unwrap());
        for (second, (actor, server, subject)) in
            [("ada", &web, "a"), ("bob", &web, "b"), ("ada", &db, "c"), ("ada", &web, "d")]
                .into_iter()
                .enumerate()
        {
            let time = jiff::Timestamp::from_second(i64::try_from(second).unwrap()).unwrap();
            let record = AuditRecord::new(time, actor, "apply", subject).of_server(server).asked("r1");
            store.commit(Batch { audit: vec![record], ..Batch::default() }).await.unwrap();
        }
        let api = Api { store, service: Service::Builder };
        let all = ListRecordsRequest::default();
        assert_eq!(page(&api, all.clone()).await, ("dcba".to_owned(), 0));
        let (first, next) = page(&api, ListRecordsRequest { page_size: 3, ..all.clone() }).await;
        assert_eq!(first, "dcb");
        assert_eq!(page(&api, ListRecordsRequest { before: next, ..all.clone() }).await, ("a".to_owned(), 0));
        let of = |server: &str, actor: &str, since: i64| ListRecordsRequest {
            server: server.to_owned(),
            actor: actor.to_owned(),
            since: Some(prost_types::Timestamp { seconds: since, nanos: 0 }),
            ..ListRecordsRequest::default()
        };
        assert_eq!(page(&api, of("web", "", 0)).await.0, "dba");
        assert_eq!(page(&api, of("web", "ada", 0)).await.0, "da");
        assert_eq!(page(&api, of("", "", 2)).await.0, "dc");
        let refused = api.list(ListRecordsRequest { server: "../x".to_owned(), ..all }).await.unwrap_err();
        assert!(matches!(refused, ApiError::Invalid { .. }));
    }
}
