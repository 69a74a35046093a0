//! What there is, a page at a time.

use kiln_api::builder::{
    GetServerRequest, GetServerResponse, ListBuildsRequest, ListBuildsResponse, ListRevisionsRequest,
    ListRevisionsResponse, ListServersRequest, ListServersResponse, ListSourcesRequest, ListSourcesResponse,
};
use kiln_api::types;
use kiln_builder_core::build::{self, Build};
use kiln_builder_core::server::{self, Server};
use kiln_builder_core::source::{self, Source};
use kiln_model::name::ServerName;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::list;
use kiln_store::Store;
use serde::de::DeserializeOwned;

use super::Api;
use crate::bakery::Bakery;
use crate::store::{REVISION_KIND, Read, StoredRevision, typed};
use crate::wire;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    /// A page of what changed of a kind.
    async fn page<T: DeserializeOwned>(
        &self,
        kind: &str,
        options: Option<types::ListOptions>,
    ) -> Result<(Vec<Read<T>>, types::ListInfo), ApiError> {
        let page = list::page(self.builder.documents.store(), kind, options).await?;
        let found = list::documents(&page).map(typed).collect::<Result<_, _>>()?;
        Ok((found, list::info(&page)))
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
