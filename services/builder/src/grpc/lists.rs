//! What there is, a page at a time.

use kiln_api::builder::{
    GetServerRequest, GetServerResponse, ListBuildsRequest, ListBuildsResponse, ListRevisionsRequest,
    ListRevisionsResponse, ListServersRequest, ListServersResponse, ListSourcesRequest, ListSourcesResponse,
};
use kiln_api::convert::{ListRequest, list_info};
use kiln_api::types;
use kiln_builder_core::build::{self, Build};
use kiln_builder_core::server::{self, Server};
use kiln_builder_core::source::{self, Source};
use kiln_model::name::ServerName;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_store::{Cursor, Entry, Store};
use serde::de::DeserializeOwned;

use super::Api;
use crate::bakery::Bakery;
use crate::store::{REVISION_KIND, Read, StoredRevision, typed};
use crate::wire;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    /// A page of what changed of a kind. Deletes are left out: the builder's documents that are listed are never
    /// deleted, but for sources, whose absence is seen in the full list.
    async fn page<T: DeserializeOwned>(
        &self,
        kind: &str,
        options: Option<types::ListOptions>,
    ) -> Result<(Vec<Read<T>>, types::ListInfo), ApiError> {
        let ListRequest { since, page_size, page_token } = options.try_into()?;
        let since = since.map(|cursor| Cursor { epoch: cursor.epoch, sequence: cursor.sequence });
        let page =
            self.builder.documents.store().changes(kind, since.as_ref(), &page_token, page_size).await?;
        let mut found = Vec::new();
        for entry in &page.entries {
            if let Entry::Document(document) = entry {
                found.push(typed(document)?);
            }
        }
        let info = list_info(page.cursor.epoch, page.cursor.sequence, page.next_page_token, page.full);
        Ok((found, info))
    }

    fn filter(name: &str) -> Result<Option<ServerName>, ApiError> {
        Ok(kiln_api::convert::optional_text("server", name)?)
    }

    pub(super) async fn get_one_server(
        &self,
        request: &GetServerRequest,
    ) -> Result<GetServerResponse, ApiError> {
        let read = self.server(&request.server).await?;
        Ok(GetServerResponse { server: Some(wire::server(&read.value, read.version)) })
    }

    pub(super) async fn list_all_servers(
        &self,
        request: ListServersRequest,
    ) -> Result<ListServersResponse, ApiError> {
        let (found, info) = self.page::<Server>(server::KIND, request.options).await?;
        let servers = found.iter().map(|read| wire::server(&read.value, read.version)).collect();
        Ok(ListServersResponse { servers, info: Some(info) })
    }

    pub(super) async fn list_all_sources(
        &self,
        request: ListSourcesRequest,
    ) -> Result<ListSourcesResponse, ApiError> {
        let (found, info) = self.page::<Source>(source::KIND, request.options).await?;
        let sources = found.iter().map(|read| wire::source(&read.value, read.version)).collect();
        Ok(ListSourcesResponse { sources, info: Some(info) })
    }

    pub(super) async fn list_some_builds(
        &self,
        request: ListBuildsRequest,
    ) -> Result<ListBuildsResponse, ApiError> {
        let wanted = Self::filter(&request.server)?;
        let (mut found, info) = self.page::<Build>(build::KIND, request.options).await?;
        found.retain(|read| wanted.as_ref().is_none_or(|name| read.value.server() == name));
        let builds = found.iter().map(|read| wire::build(&read.value, read.version)).collect();
        Ok(ListBuildsResponse { builds, info: Some(info) })
    }

    pub(super) async fn list_some_revisions(
        &self,
        request: ListRevisionsRequest,
    ) -> Result<ListRevisionsResponse, ApiError> {
        let wanted = Self::filter(&request.server)?;
        let (mut found, info) = self.page::<StoredRevision>(REVISION_KIND, request.options).await?;
        found.retain(|read| wanted.as_ref().is_none_or(|name| read.value.revision.server == *name));
        let revisions = found.iter().map(|read| wire::revision(&read.value.revision, read.version)).collect();
        Ok(ListRevisionsResponse { revisions, info: Some(info) })
    }
}
