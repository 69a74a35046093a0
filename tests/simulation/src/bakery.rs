//! Bakes in no time but the clock's.

use std::time::Duration;

use async_trait::async_trait;
use kiln_builder::bake::{BakeError, BakeRun, BakedImage, ReleaseFile, Resolution, ResolveRequest};
use kiln_builder::bakery::Bakery;
use kiln_builder::describe::{About, Provenance};
use kiln_model::digest::Digest;
use kiln_model::lock::{BUILDER_FORMAT, Lock, LockedBase, LockedPackage};
use kiln_model::revision::PackageVersions;

use crate::life::Life;
use crate::nature::Nature;
use crate::outside::{ARCHIVE, Outside, release_file};
use crate::store::Disk;
use crate::world::World;

#[derive(Clone)]
pub(crate) struct SimBakery {
    pub(crate) outside: Outside,
    /// Its images are on the disk that its service's store is on.
    pub(crate) disk: Disk,
    pub(crate) life: Life,
    pub(crate) world: World,
}

fn away() -> BakeError {
    let (archive, why, remedy) = (ARCHIVE.to_owned(), "is away".to_owned(), "wait".to_owned());
    BakeError::Archive { archive, why, remedy }
}

#[async_trait]
impl Bakery for SimBakery {
    async fn resolve(&self, request: ResolveRequest<'_>) -> Result<Resolution, BakeError> {
        self.life.here().await;
        let base = match request.pinned {
            Some(pinned) => pinned.base.clone(),
            None => {
                self.world.slowly().await;
                self.life.step("while it resolves").await;
                if self.outside.archive_is_away() {
                    return Err(away());
                }
                let version = self.outside.packages().0.to_string();
                let package = LockedPackage {
                    name: "nginx".to_owned(),
                    sha256: Digest::of(version.as_bytes()),
                    version,
                    architecture: "all".to_owned(),
                    size: 1,
                };
                let (suite, variant) = ("bookworm".to_owned(), "minbase".to_owned());
                LockedBase::Debian { suite, variant, packages: vec![package] }
            }
        };
        let file = match &base {
            LockedBase::Debian { packages, .. } => {
                let version = packages.first().unwrap().version.parse().unwrap();
                ReleaseFile { url: ARCHIVE.to_owned(), digest: release_file(version) }
            }
            other => panic!("{other:?}"),
        };
        let image = &request.definition.image;
        let lock = Lock {
            format: BUILDER_FORMAT,
            architecture: "amd64".to_owned(),
            base,
            steps: Vec::new(),
            env: image.env.clone(),
            user: image.user.clone(),
            command: image.command.clone(),
            timestamp: request.timestamp,
        };
        let release_files = request.pinned.is_none().then(|| vec![file]);
        Ok(Resolution { lock, security: PackageVersions::new(), release_files })
    }

    async fn bake(&self, lock: &Lock, run: BakeRun) -> Result<BakedImage, BakeError> {
        self.life.here().await;
        self.world.tell(format!("{} bakes {}", self.life.name(), run.build));
        let takes = Duration::from_millis(self.world.between(500, 8_000));
        tokio::select! {
            biased;
            () = run.cancel.cancelled() => return Err(BakeError::Cancelled),
            () = tokio::time::sleep(takes) => {}
        }
        self.life.step("while it bakes").await;
        if self.world.chance(self.world.faults().bake_fails) {
            return Err(away());
        }
        if self.disk.is_full() {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(BakeError::Io { doing: "writing", path: "layer".into(), source });
        }
        let digest = Digest::of(lock.key().unwrap().to_string().as_bytes());
        let LockedBase::Debian { packages, .. } = &lock.base else { panic!("{lock:?}") };
        let version = packages.first().unwrap().version.parse().unwrap();
        let nature = Nature::of(lock.env.get("NATURE").unwrap());
        self.outside.baked(digest, lock.env.get("IMAGE").unwrap().parse().unwrap(), version, nature);
        Ok(BakedImage { digest, layers: Vec::new(), steps: Vec::new() })
    }

    async fn sign(&self, image: Digest, _: &Provenance) -> Result<String, BakeError> {
        self.life.here().await;
        self.outside.sign(image);
        Ok("key".to_owned())
    }

    async fn describe(&self, _: Digest, _: &About) -> Result<(), BakeError> {
        Ok(())
    }

    async fn share(&self, _: Digest) -> Result<bool, BakeError> {
        Ok(false)
    }
}
