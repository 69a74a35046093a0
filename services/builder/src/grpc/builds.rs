//! Looking at builds, and ending them.

use kiln_api::builder::watch_build_response::Item;
use kiln_api::builder::{
    CancelBuildRequest, CancelBuildResponse, GetBuildRequest, GetBuildResponse, WatchBuildRequest,
    WatchBuildResponse,
};
use kiln_model::name::BuildId;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::requests;
use kiln_store::{AuditRecord, Store};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Api, Streamed};
use crate::bakery::Bakery;
use crate::builder::Builder;
use crate::wire;

/// Lines that a slow reader may lag behind before its stream waits for it.
const AHEAD: usize = 256;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub(super) async fn get_one_build(
        &self,
        request: &GetBuildRequest,
    ) -> Result<GetBuildResponse, ApiError> {
        let read = self.build_of(&request.build).await?;
        Ok(GetBuildResponse { build: Some(wire::build(&read.value, read.version)) })
    }

    pub(super) async fn cancel(
        &self,
        request: CancelBuildRequest,
        by: &str,
    ) -> Result<CancelBuildResponse, ApiError> {
        let decide = || async {
            let read = self.build_of(&request.build).await?;
            let (version, before) = (read.version, read.value.state.clone());
            let (mut edit, build) = self.builder.cancel(read, by).await?;
            let version = version + u64::from(!edit.is_empty());
            let record = AuditRecord::new(edit.now(), by, "cancel_build", &request.build);
            let record = record.of_server(build.server()).asked(&request.request_id);
            edit.audit(record.changed(
                serde_json::json!({ "state": before }),
                serde_json::json!({ "state": build.state }),
            ));
            Ok((edit.finish(), CancelBuildResponse { build: Some(wire::build(&build, version)) }))
        };
        requests::once(self.builder.documents.store(), &request.request_id, &request, decide).await
    }

    pub(super) async fn watch(
        &self,
        request: &WatchBuildRequest,
    ) -> Result<Streamed<WatchBuildResponse>, ApiError> {
        let id = self.build_of(&request.build).await?.value.id;
        let (items, stream) = mpsc::channel(AHEAD);
        let builder = self.builder.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                watched = watch(&builder, &id, &items) => {
                    if let Err(status) = watched {
                        // Nobody listens any more where this fails.
                        let _ = items.send(Err(status)).await;
                    }
                }
                () = items.closed() => {}
            }
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }
}

type Items = mpsc::Sender<Result<WatchBuildResponse, Status>>;

/// The log from its beginning and every state that is seen, up to the last.
async fn watch<S: Store, K: Bakery, C: Clock>(
    builder: &Builder<S, K, C>,
    id: &BuildId,
    items: &Items,
) -> Result<(), Status> {
    let mut sequence = builder.documents.store().sequence();
    let mut reader = builder.logs.reader(id);
    let mut told = 0;
    loop {
        sequence.borrow_and_update();
        let read = builder.documents.build(id).await.map_err(ApiError::from)?;
        let read = read.ok_or_else(|| ApiError::not_found("build", id.to_string()))?;
        // Read after the state: what was logged before the end is told before it.
        loop {
            let lines = reader
                .lines()
                .await
                .map_err(|error| ApiError::Unavailable(format!("log of {id}: {error}")))?;
            if lines.is_empty() {
                break;
            }
            for line in lines {
                send(items, Item::Line(line)).await?;
            }
        }
        if read.version != told {
            told = read.version;
            send(items, Item::Build(wire::build(&read.value, read.version))).await?;
        }
        if read.value.state.has_ended() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = reader.grown() => {}
            changed = sequence.changed() => {
                if changed.is_err() { return Ok(()); }
            }
        }
    }
}

async fn send(items: &Items, item: Item) -> Result<(), Status> {
    let sent = items.send(Ok(WatchBuildResponse { item: Some(item) })).await;
    sent.map_err(|_| Status::cancelled("nobody watches any more"))
}
