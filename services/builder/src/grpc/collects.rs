//! Removing what nobody needs, when somebody asks for it.

use kiln_api::builder::{CollectRequest, CollectResponse, Collected};
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::requests;
use kiln_store::{AuditRecord, Store};

use super::Api;
use crate::bakery::Bakery;
use crate::collect::How;
use crate::store::Edit;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub(super) async fn collect_now(
        &self,
        request: CollectRequest,
        by: &str,
    ) -> Result<CollectResponse, ApiError> {
        let store = self.builder.documents.store();
        if let Some(answer) = requests::answered(store, &request.request_id, &request).await? {
            return Ok(answer);
        }
        let how = if request.dry_run { How::Look } else { How::Remove };
        let all = self.collector.collect(how).await?;
        let collected: Vec<_> = all
            .iter()
            .map(|it| Collected { what: it.what.to_owned(), count: it.count, bytes: it.bytes })
            .collect();
        let decide = || async {
            let mut edit = Edit::new(self.builder.now());
            if how == How::Remove {
                let removed: serde_json::Map<_, _> =
                    all.iter().map(|it| (it.what.to_owned(), it.count.into())).collect();
                let record = AuditRecord::new(edit.now(), by, "collect", "images").asked(&request.request_id);
                edit.audit(record.changed(serde_json::Value::Null, removed.into()));
            }
            Ok((edit.finish(), CollectResponse { collected: collected.clone() }))
        };
        requests::once(store, &request.request_id, &request, decide).await
    }
}
