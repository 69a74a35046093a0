//! The builder's API. Each call is a few lines here; what it does is in the file of its subject.

mod apply;
mod builds;
mod collects;
mod contents;
mod exports;
mod images;
mod lists;
mod plans;
mod told;

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kiln_api::builder::builder_service_server::BuilderService;
use kiln_api::builder::{
    ApplyRequest, ApplyResponse, BuildRequest, BuildResponse, CancelBuildRequest, CancelBuildResponse,
    CollectRequest, CollectResponse, CompareImagesRequest, CompareImagesResponse, ExportImageRequest,
    ExportImageResponse, GetBuildRequest, GetBuildResponse, GetImageRequest, GetImageResponse,
    GetServerRequest, GetServerResponse, HoldRequest, HoldResponse, InspectSourceRequest,
    InspectSourceResponse, ListBuildsRequest, ListBuildsResponse, ListRevisionsRequest,
    ListRevisionsResponse, ListServersRequest, ListServersResponse, ListSourcesRequest, ListSourcesResponse,
    PlanRequest, PlanResponse, ReadDocumentRequest, ReadDocumentResponse, RemoveRequest, RemoveResponse,
    WatchBuildRequest, WatchBuildResponse,
};
use kiln_image::ImageStore;
use kiln_model::name::ServerName;
use kiln_service::access::actor;
use kiln_service::clock::Clock;
use kiln_service::config::Signing;
use kiln_service::error::ApiError;
use kiln_store::Store;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use self::exports::Exports;
use crate::bakery::Bakery;
use crate::builder::{Builder, Error};
use crate::collect::Collector;
use crate::store::Read;

/// The service behind the API.
#[derive(Clone)]
pub struct Api<S, K, C> {
    builder: Builder<S, K, C>,
    images: ImageStore,
    /// Whose signatures count.
    signing: Signing,
    exports: Exports,
    collector: Collector<S, K, C>,
    /// Comparisons that are under way: each reads two images, and keeps where they differ.
    looking: Arc<Semaphore>,
}

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub fn new(
        builder: Builder<S, K, C>,
        images: ImageStore,
        signing: Signing,
        collector: Collector<S, K, C>,
    ) -> Self {
        let looking = Arc::new(Semaphore::new(contents::AT_ONCE));
        Self { builder, images, signing, exports: Exports::default(), collector, looking }
    }

    async fn server(&self, name: &str) -> Result<Read<kiln_builder_core::server::Server>, ApiError> {
        let name: ServerName = kiln_api::convert::text("server", name)?;
        let read = self.builder.documents.server(&name).await?;
        read.ok_or_else(|| ApiError::not_found("server", name.to_string()))
    }

    /// As [`Api::server`], where a removed one is none.
    async fn live_server(&self, name: &str) -> Result<Read<kiln_builder_core::server::Server>, ApiError> {
        let read = self.server(name).await?;
        if read.value.removed {
            let todo = "apply its definition to bring it back";
            return Err(ApiError::precondition(format!("server {name} was removed"), todo));
        }
        Ok(read)
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        use kiln_builder_core::Illegal;
        match error {
            Error::Store(error) => error.into(),
            // The error itself says what to do.
            Error::Bake(ref bake) if bake.is_transient() => {
                Self::OutsideAway { reason: error.to_string(), what_to_do: "try again later".to_owned() }
            }
            Error::Bake(_) => {
                Self::precondition(error.to_string(), "change the definition, then apply it again")
            }
            Error::Illegal(Illegal::Stale { .. } | Illegal::NotOwner { .. }) => {
                Self::Conflict(error.to_string())
            }
            Error::Illegal(Illegal::State { .. } | Illegal::Refused { .. }) => {
                Self::precondition(error.to_string(), "see `kiln status` for what is there now")
            }
            Error::Lost { .. } | Error::Disk(_) => Self::Internal(error.to_string()),
        }
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn answer<T>(result: Result<T, ApiError>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(Status::from)
}

#[tonic::async_trait]
impl<S: Store, K: Bakery, C: Clock> BuilderService for Api<S, K, C> {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let by = actor(&request)?;
        self.apply_source(request.into_inner(), by).await.map(Response::new)
    }

    async fn remove(&self, request: Request<RemoveRequest>) -> Result<Response<RemoveResponse>, Status> {
        let by = actor(&request)?;
        answer(self.remove_server(request.into_inner(), by).await)
    }

    async fn inspect_source(
        &self,
        request: Request<InspectSourceRequest>,
    ) -> Result<Response<InspectSourceResponse>, Status> {
        self.inspect(request.into_inner()).await.map(Response::new)
    }

    type PlanStream = Streamed<PlanResponse>;

    async fn plan(&self, request: Request<PlanRequest>) -> Result<Response<Self::PlanStream>, Status> {
        Ok(Response::new(self.plan_server(request.into_inner())))
    }

    type BuildStream = Streamed<BuildResponse>;

    async fn build(&self, request: Request<BuildRequest>) -> Result<Response<Self::BuildStream>, Status> {
        let by = actor(&request)?;
        Ok(Response::new(self.build_server(request.into_inner(), by)))
    }

    async fn cancel_build(
        &self,
        request: Request<CancelBuildRequest>,
    ) -> Result<Response<CancelBuildResponse>, Status> {
        let by = actor(&request)?;
        answer(self.cancel(request.into_inner(), &by).await)
    }

    async fn get_build(
        &self,
        request: Request<GetBuildRequest>,
    ) -> Result<Response<GetBuildResponse>, Status> {
        answer(self.get_one_build(&request.into_inner()).await)
    }

    async fn list_builds(
        &self,
        request: Request<ListBuildsRequest>,
    ) -> Result<Response<ListBuildsResponse>, Status> {
        answer(self.list_some_builds(request.into_inner()).await)
    }

    type WatchBuildStream = Streamed<WatchBuildResponse>;

    async fn watch_build(
        &self,
        request: Request<WatchBuildRequest>,
    ) -> Result<Response<Self::WatchBuildStream>, Status> {
        answer(self.watch(&request.into_inner()).await)
    }

    async fn get_server(
        &self,
        request: Request<GetServerRequest>,
    ) -> Result<Response<GetServerResponse>, Status> {
        answer(self.get_one_server(&request.into_inner()).await)
    }

    async fn list_servers(
        &self,
        request: Request<ListServersRequest>,
    ) -> Result<Response<ListServersResponse>, Status> {
        answer(self.list_all_servers(request.into_inner()).await)
    }

    async fn list_sources(
        &self,
        request: Request<ListSourcesRequest>,
    ) -> Result<Response<ListSourcesResponse>, Status> {
        answer(self.list_all_sources(request.into_inner()).await)
    }

    async fn list_revisions(
        &self,
        request: Request<ListRevisionsRequest>,
    ) -> Result<Response<ListRevisionsResponse>, Status> {
        answer(self.list_some_revisions(request.into_inner()).await)
    }

    async fn get_image(
        &self,
        request: Request<GetImageRequest>,
    ) -> Result<Response<GetImageResponse>, Status> {
        answer(self.get_one_image(&request.into_inner()).await)
    }

    type ExportImageStream = Streamed<ExportImageResponse>;

    async fn export_image(
        &self,
        request: Request<ExportImageRequest>,
    ) -> Result<Response<Self::ExportImageStream>, Status> {
        answer(self.export(&request.into_inner()).await)
    }

    type ReadDocumentStream = Streamed<ReadDocumentResponse>;

    async fn read_document(
        &self,
        request: Request<ReadDocumentRequest>,
    ) -> Result<Response<Self::ReadDocumentStream>, Status> {
        answer(self.document(&request.into_inner()).await)
    }

    type CompareImagesStream = Streamed<CompareImagesResponse>;

    async fn compare_images(
        &self,
        request: Request<CompareImagesRequest>,
    ) -> Result<Response<Self::CompareImagesStream>, Status> {
        answer(self.compare(&request.into_inner()).await)
    }

    async fn collect(&self, request: Request<CollectRequest>) -> Result<Response<CollectResponse>, Status> {
        let by = actor(&request)?;
        answer(self.collect_now(request.into_inner(), &by).await)
    }

    async fn hold(&self, request: Request<HoldRequest>) -> Result<Response<HoldResponse>, Status> {
        let by = actor(&request)?;
        answer(self.hold_images(request.into_inner(), &by).await)
    }
}
