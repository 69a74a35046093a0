use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kiln_model::event::Service;
use kiln_node::{Failure, Names, doctor, leftovers, purge};
use kiln_service::config::{EXIT_BAD_CONFIG, Site};
use kiln_service::guard::Guard;

/// What the node's program does besides running the node.
#[derive(Debug, Parser)]
#[command(name = "kiln-node", version)]
struct Other {
    /// The folder of the site
    #[arg(long, env = "KILN_HOME")]
    home: Option<PathBuf>,
    /// Remove everything that the site has made on this machine; the node must not run
    #[arg(long, requires = "home")]
    purge: bool,
    /// Print what is on this machine that carries the site's id
    #[arg(long, requires = "home", conflicts_with = "purge")]
    leftovers: bool,
    /// Look at the machine and print the findings as JSON
    #[arg(long)]
    doctor: bool,
    /// With --doctor: a port that users are to connect to
    #[arg(long, requires = "doctor", value_name = "PORT")]
    port: Vec<u16>,
    /// With --doctor: a port that the site itself needs, by its setting, as in metrics.node=20001
    #[arg(long, requires = "doctor", value_name = "SETTING=PORT", value_parser = own_port)]
    own_port: Vec<(String, u16)>,
}

fn own_port(text: &str) -> Result<(String, u16), String> {
    let (setting, port) = text.split_once('=').ok_or("it must have the form SETTING=PORT")?;
    Ok((setting.to_owned(), port.parse().map_err(|_| format!("`{port}` is no port"))?))
}

fn main() -> ExitCode {
    let asked = |name: &str| std::env::args().skip(1).any(|argument| argument == name);
    if !["--purge", "--leftovers", "--doctor"].into_iter().any(asked) {
        return kiln_service::run::main(Service::Node, kiln_node::run);
    }
    let other = Other::parse();
    let done = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = done
        .map_err(|error| Failure::new("starting", error))
        .and_then(|runtime| runtime.block_on(act(other)));
    done.unwrap_or_else(|failure| {
        eprintln!("kiln-node: {failure}");
        ExitCode::FAILURE
    })
}

async fn act(other: Other) -> Result<ExitCode, Failure> {
    let site = match other.home.as_deref().map(Site::load).transpose() {
        Ok(site) => site,
        Err(error) => {
            eprintln!("kiln-node: {error}");
            return Ok(ExitCode::from(EXIT_BAD_CONFIG));
        }
    };
    if other.doctor {
        let ports = doctor::Ports { listen: &other.port, own: &other.own_port };
        let findings = doctor::examine(site.as_ref(), &ports).await;
        let json = serde_json::to_string_pretty(&findings);
        println!("{}", json.map_err(|error| Failure::new("writing the findings", error))?);
        let fine = findings.iter().all(|finding| finding.ok);
        return Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let Some(site) = site else { return Ok(ExitCode::from(EXIT_BAD_CONFIG)) };
    let names = Names::of(&site);
    if other.purge {
        let _guard = alone(&site).await?;
        purge(&names).await?;
    } else {
        for line in leftovers(&names).await? {
            println!("{line}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Keeps a node of the site from starting. One that was just killed may have left a child that has its lock until it
/// becomes another program.
async fn alone(site: &Site) -> Result<Guard, Failure> {
    let mut tries = 20;
    loop {
        match Guard::take(site.paths(), Service::Node) {
            Ok(guard) => return Ok(guard),
            Err(error) if tries == 0 => return Err(Failure::new("purging the site", error)),
            Err(_) => tries -= 1,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
