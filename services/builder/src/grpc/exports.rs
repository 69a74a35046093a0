//! Images on their way to whoever reads them: at the reader's pace, within bounds.
//!
//! An image is written by a thread that waits for its reader. There are 512 such threads, for everything that waits for a
//! disk, so neither many readers nor slow ones may have them all.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use kiln_api::builder::{ExportForm, ExportImageResponse};
use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_service::error::ApiError;
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::Streamed;
use super::images::image_error;

/// One message of an export.
const CHUNK: usize = 256 << 10;
/// Messages that a slow reader may lag behind.
const AHEAD: usize = 8;

/// The exports that are under way.
#[derive(Debug, Clone)]
pub(super) struct Exports {
    most: usize,
    places: Arc<Semaphore>,
    /// How long a reader may take nothing.
    patience: Duration,
}

impl Default for Exports {
    fn default() -> Self {
        Self::new(16, Duration::from_secs(30))
    }
}

impl Exports {
    fn new(most: usize, patience: Duration) -> Self {
        Self { most, places: Arc::new(Semaphore::new(most)), patience }
    }

    /// An image's tar in that form, under a name that it is to have elsewhere. A stream that ends without an error has all of it.
    ///
    /// # Errors
    /// [`ApiError::Exhausted`] where as many are under way as may be.
    pub(super) fn begin(
        &self,
        images: ImageStore,
        digest: Digest,
        name: String,
        form: ExportForm,
    ) -> Result<Streamed<ExportImageResponse>, ApiError> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Err(ApiError::Exhausted {
                reason: format!("{} images are being exported, as many as may be at once", self.most),
                what_to_do: "export it when one of them is done".to_owned(),
            });
        };
        let (chunks, read) = mpsc::channel(AHEAD);
        let (runtime, patience) = (Handle::current(), self.patience);
        let writing = tokio::task::spawn_blocking(move || {
            let _place = place;
            export(&images, &digest, &name, form, Reader { runtime, chunks, patience, gone: None })
        });
        let end = stream::once(writing).filter_map(async |written| match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(error.into())),
            Err(error) => Some(Err(ApiError::internal(&error).into())),
        });
        Ok(Box::pin(ReceiverStream::new(read).map(Ok).chain(end)))
    }
}

fn export(
    images: &ImageStore,
    digest: &Digest,
    name: &str,
    form: ExportForm,
    reader: Reader,
) -> Result<(), ApiError> {
    let mut writer = BufWriter::with_capacity(CHUNK, reader);
    let written = match form {
        ExportForm::Root => images.export_root(digest, &mut writer),
        ExportForm::Oci | ExportForm::Unspecified => images.export(digest, name, &mut writer),
    };
    // Not dropped, which would write what is left to a reader who takes nothing.
    let (reader, _) = writer.into_parts();
    match (written, reader.gone) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(gone)) => Err(gone.error(digest, reader.patience)),
        (Err(error), None) => Err(image_error(&error, digest)),
    }
}

/// Why a reader gets no more.
#[derive(Debug, Clone, Copy)]
enum Gone {
    Left,
    TookNothing,
}

impl Gone {
    fn error(self, digest: &Digest, patience: Duration) -> ApiError {
        match self {
            Self::Left => ApiError::Unavailable(format!("whoever read the image {digest} left")),
            Self::TookNothing => ApiError::Exhausted {
                reason: format!(
                    "the export of {digest} was given up: nothing of it was read for {patience:?}"
                ),
                what_to_do: "export it again, and read it as it comes".to_owned(),
            },
        }
    }
}

struct Reader {
    runtime: Handle,
    chunks: mpsc::Sender<ExportImageResponse>,
    patience: Duration,
    gone: Option<Gone>,
}

impl Write for Reader {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let data = data.get(..CHUNK).unwrap_or(data);
        let chunk = ExportImageResponse { data: data.to_vec() };
        self.runtime.block_on(self.chunks.send_timeout(chunk, self.patience)).map_err(|refused| {
            self.gone = Some(match refused {
                SendTimeoutError::Timeout(_) => Gone::TookNothing,
                SendTimeoutError::Closed(_) => Gone::Left,
            });
            io::Error::from(io::ErrorKind::BrokenPipe)
        })?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use kiln_image::{Layer, NewImage};
    use kiln_service::error::describe;
    use tonic::{Code, Status};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const NAME: &str = "kiln/web:1";

    /// With one image of more than a reader may lag behind. Nobody looks into its layer.
    fn store() -> (tempfile::TempDir, ImageStore, Digest) {
        let folder = tempfile::tempdir().unwrap();
        let images = ImageStore::open(folder.path()).unwrap();
        let content = vec![7; 2 * AHEAD * CHUNK];
        let (diff_id, size) = images.put_blob(&mut content.as_slice(), None).unwrap();
        let created = "2026-01-01T00:00:00Z".to_owned();
        let layer = Layer { diff_id, size, created_by: "a test".to_owned(), created: created.clone() };
        let image = NewImage {
            architecture: "amd64".to_owned(),
            created,
            env: BTreeMap::new(),
            user: String::new(),
            command: vec!["serve".to_owned()],
            labels: BTreeMap::new(),
            layers: vec![layer],
        };
        let digest = images.put_image(&image).unwrap();
        (folder, images, digest)
    }

    async fn all_free(exports: &Exports) {
        let begin = Instant::now();
        while exports.places.available_permits() < exports.most {
            assert!(begin.elapsed() < LONG, "no thread comes back");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn read(stream: Streamed<ExportImageResponse>) -> Result<Vec<u8>, Status> {
        let chunks: Vec<_> = stream.collect().await;
        let chunks: Vec<_> = chunks.into_iter().collect::<Result<_, _>>()?;
        Ok(chunks.into_iter().flat_map(|chunk| chunk.data).collect())
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_given_up_and_is_told_so() {
        let (_folder, images, digest) = store();
        let exports = Exports::new(1, Duration::from_millis(100));
        let stream = exports.begin(images, digest, NAME.to_owned(), ExportForm::Oci).unwrap();
        all_free(&exports).await;
        // What it has got by now is not taken for the whole.
        let status = read(stream).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let text = describe(&status);
        assert!(text.contains("nothing of it was read for 100ms") && text.ends_with("; try again"), "{text}");
    }

    #[tokio::test]
    async fn exports_beyond_the_bound_are_refused_until_one_is_done_or_left() {
        let (_folder, images, digest) = store();
        let exports = Exports::new(2, LONG);
        let begin = || exports.begin(images.clone(), digest, NAME.to_owned(), ExportForm::Oci);
        let (left, slow) = (begin().unwrap(), begin().unwrap());
        let refused = Status::from(begin().err().expect("a third is let in"));
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(describe(&refused).contains("2 images are being exported"), "{refused}");
        drop(left);
        let mut whole = Vec::new();
        images.export(&digest, NAME, &mut whole).unwrap();
        assert!(read(slow).await.unwrap() == whole, "a slow reader gets all of it");
        all_free(&exports).await;
        assert!(read(begin().unwrap()).await.unwrap() == whole);
    }

    #[tokio::test]
    async fn what_can_not_be_read_to_its_end_is_an_error_at_the_end() {
        let (_folder, images, digest) = store();
        let layer = images.image(&digest).unwrap().layers[0].diff_id;
        std::fs::remove_file(images.root().join("blobs/sha256").join(layer.hex())).unwrap();
        let stream = Exports::default().begin(images, digest, NAME.to_owned(), ExportForm::Oci).unwrap();
        assert!(read(stream).await.is_err());
    }
}
