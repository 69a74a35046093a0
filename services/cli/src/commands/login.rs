//! `kiln login`

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use kiln_api::builder::ListServersRequest;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::types::ListOptions;
use kiln_model::event::Service;
use kiln_service::certificate::Certificate;
use serde_json::json;
use zeroize::Zeroizing;

use crate::clients::look;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::login::{Login as Kept, Proof, Servers};
use crate::screen::Screen;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("proof").required(true))]
pub(crate) struct Login {
    /// Where the site is: https://HOST for all services on their usual ports (7101 to 7104), or SERVICE=https://HOST:PORT
    #[arg(long, value_name = "URL", required = true)]
    server: Vec<String>,
    /// The site's authority.pem, by which its servers are known
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// A certificate that `kiln pki issue` gave, with its key unless --key names that
    #[arg(long, value_name = "FILE", group = "proof")]
    certificate: Option<PathBuf>,
    /// The certificate's key, where it is in a file of its own
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// Read a token of `kiln token create` from standard input
    #[arg(long, group = "proof")]
    token: bool,
    /// Read a token from a file
    #[arg(long, value_name = "FILE", group = "proof")]
    token_file: Option<PathBuf>,
}

fn text(path: &Path) -> Outcome<Zeroizing<String>> {
    kiln_secret::read(path).during(format_args!("reading {}", path.display()))
}

pub(crate) async fn run(it: &Login, home: &Home, screen: Screen) -> Outcome {
    let site = home.name();
    let servers =
        Servers::parse(&it.server).map_err(|why| Failure::new(Code::Invalid, "the option --server", why))?;
    let authority = text(&it.authority)?;
    let proof = match (&it.certificate, &it.token_file) {
        (Some(path), _) => {
            let mut pem = text(path)?;
            if let Some(key) = &it.key {
                pem = Zeroizing::new([pem.as_str(), &text(key)?].concat());
            }
            let read = Certificate::of_pem(&pem).and_then(|read| read.identity(site));
            read.map_err(|why| {
                Failure::new(Code::Invalid, format!("the certificate {}", path.display()), why)
                    .todo("name the site with --site, as its certificates do")
            })?;
            Proof::Certificate(pem)
        }
        (None, Some(path)) => Proof::Token(text(path)?.trim().to_owned().into()),
        (None, None) => {
            let token = kiln_secret::read_from(std::io::stdin()).during("reading the token")?;
            Proof::Token(token.trim().to_owned().into())
        }
    };
    let kept = Kept::keep(site, servers, &authority, &proof)?;
    // The least that every role may: whoever is refused here is refused everywhere.
    let mut builder = BuilderServiceClient::new(kept.channel(Service::Builder, None)?);
    let options = Some(ListOptions { page_size: 1, ..ListOptions::default() });
    look(builder.list_servers(ListServersRequest { options }))
        .await
        .during(format_args!("logging in to {site}"))?;
    screen.json(&json!({ "site": site.as_str(), "folder": kept.folder().display().to_string() }))?;
    screen.line(format_args!("logged in to {site}; kept in {}", kept.folder().display()))?;
    screen.next(&[format!("kiln --site {site} status")])
}
