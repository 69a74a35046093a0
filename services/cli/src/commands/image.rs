//! `kiln image`

mod tested;

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use kiln_api::builder::{
    Document, ExportForm, ExportImageRequest, GetImageRequest, Image as ImageMessage, ReadDocumentRequest,
};
use pulldown_cmark::{Event, Options, Parser};
use serde_json::json;

use crate::clients::Services;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::json;
use crate::screen::{Screen, plain, write_all};
use crate::words::{or_dash, size};

pub(crate) use tested::table as tests_table;

#[derive(Debug, Args)]
pub(crate) struct Image {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Show what an image is made of
    Inspect {
        /// An image's digest, a build, or a server for its newest image
        #[arg(value_name = "SERVER|BUILD|DIGEST")]
        image: String,
    },
    /// Show what the tests of an image came to, also of one that did not pass them
    Tests {
        /// A build, or a server for its last build
        #[arg(value_name = "SERVER|BUILD")]
        build: String,
        /// Write them as JUnit too, for CI systems
        #[arg(long, value_name = "FILE")]
        junit: Option<PathBuf>,
    },
    /// Show the packages in an image with their licences, as CycloneDX
    Sbom {
        /// An image's digest, a build, or a server for its newest image
        #[arg(value_name = "SERVER|BUILD|DIGEST")]
        image: String,
        /// Write it there
        #[arg(short = 'f', long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Show where an image comes from, as SLSA provenance signed with DSSE
    Provenance {
        /// An image's digest, a build, or a server for its newest image
        #[arg(value_name = "SERVER|BUILD|DIGEST")]
        image: String,
        /// Write it there
        #[arg(short = 'f', long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Show a page about an image: what it is, what is in it, what changed and why
    Datasheet {
        /// An image's digest, a build, or a server for its newest image
        #[arg(value_name = "SERVER|BUILD|DIGEST")]
        image: String,
        /// As HTML in the place of Markdown
        #[arg(long)]
        html: bool,
        /// Write it there
        #[arg(short = 'f', long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Write an image into a file
    Export {
        /// An image's digest, a build, or a server for its newest image
        #[arg(value_name = "SERVER|BUILD|DIGEST")]
        image: String,
        /// For whom
        #[arg(long, value_enum, default_value_t = Format::Oci)]
        format: Format,
        /// Where to write it; `-` for standard output [default: <image>.<format>.tar]
        #[arg(short = 'f', long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// An OCI layout in a tar, for skopeo, podman and buildah
    Oci,
    /// An archive for `docker load`
    Docker,
    /// The root file system as a plain tar, without layers
    Root,
}

impl Format {
    /// As people call it; what the file's name ends in; what can be done with the file.
    const fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Oci => ("an OCI layout", "oci.tar", "skopeo inspect oci-archive:"),
            Self::Docker => ("an archive for docker", "docker.tar", "docker load -i "),
            Self::Root => ("the root file system", "root.tar", "tar -tvf "),
        }
    }
}

pub(crate) async fn run(it: &Image, services: &Services, screen: Screen) -> Outcome {
    match &it.command {
        ImageCommand::Inspect { image } => inspect(image, services, screen).await,
        ImageCommand::Tests { build, junit } => tested::run(build, junit.as_deref(), services, screen).await,
        ImageCommand::Sbom { image, file } => {
            let wanted = Wanted { document: Document::Sbom, name: "SBOM", is: "a CycloneDX SBOM" };
            let content = wanted.read(image, services).await?;
            wanted.give(content, image, file.as_deref(), screen)
        }
        ImageCommand::Provenance { image, file } => {
            let wanted = Wanted {
                document: Document::Provenance,
                name: "provenance",
                is: "the signed SLSA provenance",
            };
            let content = wanted.read(image, services).await?;
            wanted.give(content, image, file.as_deref(), screen)
        }
        ImageCommand::Datasheet { image, html, file } => {
            let wanted = Wanted { document: Document::Datasheet, name: "datasheet", is: "the datasheet" };
            let mut content = wanted.read(image, services).await?;
            if *html {
                content = page(image, &String::from_utf8_lossy(&content)).into_bytes();
            }
            wanted.give(content, image, file.as_deref(), screen)
        }
        ImageCommand::Export { image, format, file } => {
            export(image, *format, file.as_deref(), services, screen).await
        }
    }
}

async fn get(name: &str, services: &Services) -> Outcome<ImageMessage> {
    let request = GetImageRequest { image: name.to_owned() };
    let answer =
        services.builder().get_image(request).await.during(format_args!("looking up the image {name}"))?;
    answer
        .into_inner()
        .image
        .ok_or_else(|| Failure::new(Code::NotFound, format!("there is no image {name}"), ""))
}

async fn inspect(name: &str, services: &Services, screen: Screen) -> Outcome {
    let image = get(name, services).await?;
    screen.json(&json::of("kiln.builder.v1.Image", &image)?)?;
    screen.line(format_args!("image      {}", image.digest))?;
    screen.line(format_args!("server     {}", or_dash(&image.server)))?;
    screen.line(format_args!("build      {}", or_dash(&image.build)))?;
    screen.line(format_args!("lock       {}", or_dash(&image.lock_key)))?;
    let signature = if image.verified { "verified" } else { "NOT VERIFIED" };
    screen.line(format_args!("signature  {signature}, key {}", or_dash(&image.key_id)))?;
    screen.line("")?;
    let rows = image
        .layers
        .iter()
        .map(|layer| vec![plain(&layer.digest), plain(size(layer.size)), plain(&layer.created_by)])
        .collect();
    screen.table(&["LAYER", "SIZE", "MADE BY"], rows)?;
    if !image.packages.is_empty() {
        screen.line("")?;
        let rows = image.packages.iter().map(|(name, version)| vec![plain(name), plain(version)]).collect();
        screen.table(&["PACKAGE", "VERSION"], rows)?;
    }
    screen.next(&[format!("kiln image export {name}"), format!("kiln image inspect {name} -o json")])
}

/// A document on an image, as people call it.
struct Wanted {
    document: Document,
    name: &'static str,
    is: &'static str,
}

impl Wanted {
    async fn read(&self, image: &str, services: &Services) -> Outcome<Vec<u8>> {
        let what = format!("reading the {} of {image}", self.name);
        let request = ReadDocumentRequest { image: image.to_owned(), document: self.document.into() };
        let mut stream = services.builder().read_document(request).await.during(&what)?.into_inner();
        let mut content = Vec::new();
        while let Some(part) = stream.message().await.during(&what)? {
            content.extend_from_slice(&part.data);
        }
        Ok(content)
    }

    /// To a file, or to standard output.
    fn give(&self, mut content: Vec<u8>, image: &str, file: Option<&Path>, screen: Screen) -> Outcome {
        let Some(path) = file else {
            content.push(b'\n');
            return write_all(&content);
        };
        std::fs::write(path, &content).during(format_args!("writing {}", path.display()))?;
        screen
            .json(&json!({ "image": image, "file": path.display().to_string(), "bytes": content.len() }))?;
        let bytes = size(content.len() as u64);
        screen.line(format_args!("{} is {} of {image}: {bytes}", path.display(), self.is))
    }
}

/// A whole page of HTML. What the datasheet holds of the image is escaped in it already, and HTML in Markdown is shown as text.
fn page(title: &str, markdown: &str) -> String {
    let events = Parser::new_ext(markdown, Options::ENABLE_TABLES).map(|event| match event {
        Event::Html(text) | Event::InlineHtml(text) => Event::Text(text),
        other => other,
    });
    let mut body = String::new();
    pulldown_cmark::html::push_html(&mut body, events);
    let mut escaped = String::new();
    // Writing to a String does not fail.
    let _ = pulldown_cmark_escape::escape_html(&mut escaped, title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{escaped}</title>\n<style>\n\
         body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}\n\
         table {{ border-collapse: collapse; }}\n\
         td, th {{ border: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: left; overflow-wrap: anywhere; }}\n\
         </style>\n</head>\n<body>\n{body}</body>\n</html>"
    )
}

async fn export(
    name: &str,
    format: Format,
    file: Option<&Path>,
    services: &Services,
    screen: Screen,
) -> Outcome {
    let what = format!("exporting the image {name}");
    let to_stdout = file == Some(Path::new("-"));
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(
            Failure::new(Code::Refused, what, "a tar is nothing for a terminal").todo("name a file with -f")
        );
    }
    if to_stdout && screen.is_json() {
        return Err(Failure::new(
            Code::Refused,
            what,
            "the tar and the JSON would both go to standard output",
        )
        .todo("name a file with -f"));
    }
    // What docker loads lies in the layout's tar.
    let form = if format == Format::Root { ExportForm::Root } else { ExportForm::Oci };
    let request = ExportImageRequest { image: name.to_owned(), form: form.into() };
    let mut stream = services.builder().export_image(request).await.during(&what)?.into_inner();
    let (is, ending, look) = format.words();
    let path =
        file.map_or_else(|| PathBuf::from(format!("{}.{ending}", name.replace(':', "-"))), Path::to_path_buf);
    let bar = screen.bar(0);
    let mut written = 0_u64;
    if to_stdout {
        while let Some(part) = stream.message().await.during(&what)? {
            write_all(&part.data)?;
        }
        return Ok(());
    }
    // Under its name only when it is whole.
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut partial: tempfile::NamedTempFile<File> =
        tempfile::NamedTempFile::new_in(folder).during(format_args!("writing to {}", folder.display()))?;
    while let Some(part) = stream.message().await.during(&what)? {
        partial.write_all(&part.data).during(format_args!("writing {}", path.display()))?;
        written += part.data.len() as u64;
        bar.message(format_args!("{} written", size(written)));
    }
    drop(bar);
    partial.persist(&path).map_err(|error| error.error).during(format_args!("writing {}", path.display()))?;
    screen.json(&json!({ "image": name, "file": path.display().to_string(), "bytes": written }))?;
    screen.line(format_args!("{} is {is} of {}", path.display(), size(written)))?;
    screen.next(&[format!("{look}{}", path.display())])
}
