//! `kiln pki`

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use jiff::Timestamp;
use kiln_service::access::{Identity, Role};
use kiln_service::certificate::Certificate;
use kiln_service::config::{LONGEST_SERVICE_LIFE, Site, lifetime};
use serde_json::{Value, json};

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::{Screen, bad, busy, good, plain};
use crate::site::ledger::{Deed, Ledger};
use crate::site::pki::Step;
use crate::site::{self, keys, pki};

#[derive(Debug, Args)]
pub(crate) struct Pki {
    #[command(subcommand)]
    command: PkiCommand,
}

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Make the site's authority and the certificates of its services, where they are missing
    Init,
    /// Give out a certificate with its key: to a service on another machine, or to a person
    Issue {
        /// builder, deployer, monitor, node, console or broker for a service; else the name of a person
        name: String,
        /// What a person may: viewer, operator or admin
        #[arg(long, value_name = "ROLE", default_value = "viewer")]
        role: Role,
        /// A host name or an address that the service answers to
        #[arg(long, value_name = "HOST")]
        host: Vec<String>,
        /// How long it is good, such as 12h or 30d [default: 24h for a service, 30d for a person; at most 30d and 90d]
        #[arg(long, value_name = "DURATION", value_parser = lifetime)]
        life: Option<Duration>,
        /// Where to write it, readable by its owner alone
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Renew the certificates of this machine's services and broker now; they take them without a restart
    Renew,
    /// Show the authorities and the certificates of this machine
    List,
    /// Put another authority in the place of the one there is, in three steps
    Rotate {
        /// Second step, once every machine has the new authority.pem: the next authority signs
        #[arg(long)]
        switch: bool,
        /// Last step, once every certificate is renewed: the old authority is trusted no more
        #[arg(long, conflicts_with = "switch")]
        finish: bool,
    },
}

const DAY: Duration = Duration::from_secs(24 * 3600);
const SERVICE_LIFE: Duration = DAY;
const PERSON_LIFE: Duration = DAY.saturating_mul(30);
/// No certificate can be revoked: what is stolen is of use for so long.
const LONGEST_PERSON_LIFE: Duration = DAY.saturating_mul(90);

pub(crate) fn run(it: Pki, home: &Home, screen: Screen) -> Outcome {
    let site = site::load(home)?;
    match it.command {
        PkiCommand::Init => {
            pki::ensure(&site)?;
            list(&site, screen)
        }
        PkiCommand::Issue { name, role, host, life, out } => {
            let identity = identity(&name, role)?;
            if identity.role().is_person() != host.is_empty() {
                let why = "a service needs the --host that others call it by, a person has none";
                return Err(Failure::new(Code::Invalid, format!("the certificate of {name}"), why));
            }
            let life = life_of(identity.role(), life)?;
            let mut ledger = Ledger::open(&site)?;
            let issued = pki::issue(&pki::authority(&site)?, &identity, &host, life)?;
            let read =
                Certificate::of_pem(&issued.certificate).map_err(|why| Failure::failed("reading it", why))?;
            let document = document(&read, &out);
            let deed = Deed {
                action: "pki.issue",
                subject: identity.uri(&site.name),
                before: Value::Null,
                after: document.clone(),
            };
            ledger.carry_out(&deed, || keys::write(&out, &issued.reveal()))?;
            screen.json(&document)?;
            let authority = site.paths().authority();
            screen.line(format_args!(
                "{} has the certificate and key of {}, good until {}",
                out.display(),
                identity.uri(&site.name),
                Timestamp::try_from(read.until).map(|until| until.to_string()).unwrap_or_default()
            ))?;
            if identity.role().is_person() {
                screen.next(&[format!(
                    "kiln --site {} login --server https://HOST --authority {} --certificate {}",
                    site.name,
                    authority.display(),
                    out.display()
                )])
            } else {
                screen.next(&[format!(
                    "bring it with {} into keys/pki of the other machine",
                    authority.display()
                )])
            }
        }
        PkiCommand::Renew => {
            pki::renew(&site, true)?;
            list(&site, screen)
        }
        PkiCommand::List => list(&site, screen),
        PkiCommand::Rotate { switch, finish } => {
            let step = match (switch, finish) {
                (true, _) => Step::Switch,
                (_, true) => Step::Finish,
                _ => Step::Prepare,
            };
            rotate(&site, step)?;
            list(&site, screen)?;
            match step {
                Step::Switch => screen.next(&[
                    "renew what was given to people and other machines, then: kiln pki rotate --finish",
                ]),
                Step::Finish => Ok(()),
                Step::Prepare => screen.next(&[format!(
                    "bring {} to every other machine and person, then: kiln pki rotate --switch",
                    site.paths().authority().display()
                )]),
            }
        }
    }
}

fn rotate(site: &Site, step: Step) -> Outcome {
    let mut ledger = Ledger::open(site)?;
    let before = pki::authorities(site)?;
    let after = pki::after(site, step)?;
    let action = match step {
        Step::Prepare => "pki.rotate",
        Step::Switch => "pki.rotate.switch",
        Step::Finish => "pki.rotate.finish",
    };
    let deed = Deed { action, subject: after.signs.clone(), before: json!(before), after: json!(after) };
    ledger.carry_out(&deed, || pki::rotate(site, step))
}

fn life_of(role: Role, asked: Option<Duration>) -> Outcome<Duration> {
    let (usual, longest) = if role.is_person() {
        (PERSON_LIFE, LONGEST_PERSON_LIFE)
    } else {
        (SERVICE_LIFE, LONGEST_SERVICE_LIFE)
    };
    let life = asked.unwrap_or(usual);
    if life <= longest {
        return Ok(life);
    }
    let days = longest.as_secs() / DAY.as_secs();
    Err(Failure::new(
        Code::Invalid,
        format!("a certificate for a {role}"),
        format!("it can't be revoked, so it is good for {days} days at most"),
    )
    .todo(format!("--life {days}d, and issue another one before it ends; a person may have a token instead")))
}

fn identity(name: &str, role: Role) -> Outcome<Identity> {
    let wrong = |why: String| Failure::new(Code::Invalid, format!("a certificate for {name}"), why);
    match name.parse::<Role>() {
        Ok(service) if !service.is_person() => Identity::service(service).map_err(wrong),
        _ => Identity::person(name.parse().map_err(wrong)?, role).map_err(wrong),
    }
}

fn document(it: &Certificate, path: &std::path::Path) -> serde_json::Value {
    let time = |time| Timestamp::try_from(time).map(|time| time.to_string()).ok();
    json!({
        "name": it.uri().unwrap_or(&it.subject),
        "hosts": it.hosts,
        "issuer": it.issuer,
        "serial": it.serial,
        "from": time(it.from),
        "until": time(it.until),
        "file": path.display().to_string(),
    })
}

fn list(site: &Site, screen: Screen) -> Outcome {
    let bundle = site.paths().authority();
    let text = std::fs::read_to_string(&bundle).during(format_args!("reading {}", bundle.display()))?;
    let mut found: Vec<_> = pki::of_bundle(&text).into_iter().map(|it| (it, bundle.clone())).collect();
    for holder in pki::holders(site) {
        let path = site.paths().identity(holder);
        // A machine may run some of the services only.
        let Ok(text) = kiln_secret::read(&path) else { continue };
        let read = Certificate::of_pem(&text);
        let read = read.map_err(|why| Failure::failed(format!("the certificate {}", path.display()), why))?;
        found.push((read, path));
    }
    let documents: Vec<_> = found.iter().map(|(it, path)| document(it, path)).collect();
    screen.json(&json!({ "certificates": documents }))?;
    let now = SystemTime::now();
    let rows = found.iter().map(|(it, _)| {
        let state = match it.until.duration_since(now) {
            Err(_) => bad("ended"),
            Ok(_) if it.is_due(now) => busy("due"),
            Ok(_) => good("good"),
        };
        let until = Timestamp::try_from(it.until).map(|until| until.to_string()).unwrap_or_default();
        vec![plain(it.uri().unwrap_or(&it.subject)), state, plain(until), plain(it.hosts.join(", "))]
    });
    screen.table(&["CERTIFICATE", "STATE", "UNTIL", "HOSTS"], rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::create::{Wishes, ensure as make};
    use crate::site::ledger::Log;

    #[test]
    fn each_step_of_a_rotation_is_recorded_with_the_authorities_before_and_after() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home")), "test").unwrap();
        let site = make(&home, &Wishes { nats_url: None, store: None, settings: Vec::new() }).unwrap();
        let first = json!(pki::authorities(&site).unwrap());
        rotate(&site, Step::Switch).unwrap_err();
        for step in [Step::Prepare, Step::Switch, Step::Finish] {
            rotate(&site, step).unwrap();
        }
        let log = Log::read(&site).unwrap();
        let records: Vec<_> = log.records().map(|(_, record)| record).collect();
        let actions: Vec<_> = records.iter().rev().map(|record| record.action.as_str()).collect();
        assert_eq!(actions, ["pki.rotate", "pki.rotate.switch", "pki.rotate.finish"]);
        let [finish, switch, prepare] = records[..] else { panic!("{records:?}") };
        assert_eq!(
            (&prepare.before["signs"], &prepare.before["trusted"]),
            (&first["signs"], &first["trusted"])
        );
        assert_eq!(prepare.after["trusted"].as_array().map(Vec::len), Some(2));
        assert_eq!((&switch.before, &finish.before), (&prepare.after, &switch.after));
        assert_eq!(switch.after["signs"], prepare.after["next"]);
        assert_eq!(finish.after, json!(pki::authorities(&site).unwrap()));
        assert_ne!(finish.after["signs"], first["signs"]);
    }

    #[test]
    fn no_certificate_is_good_for_longer_than_its_loss_would_be_bearable() {
        for (role, usual, longest) in [(Role::Node, 1, 30), (Role::Admin, 30, 90)] {
            assert_eq!(life_of(role, None).unwrap(), DAY * usual);
            assert_eq!(life_of(role, Some(DAY * longest)).unwrap(), DAY * longest);
            let failure = life_of(role, Some(DAY * longest + Duration::from_secs(1))).unwrap_err();
            assert!(failure.line().contains(&format!("{longest} days at most")), "{failure:?}");
        }
    }

    #[test]
    fn whose_certificate_was_given_out_is_recorded_and_not_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home")), "test").unwrap();
        let site = make(&home, &Wishes { nats_url: None, store: None, settings: Vec::new() }).unwrap();
        let command = |out: PathBuf| Pki {
            command: PkiCommand::Issue {
                name: "ada".to_owned(),
                role: Role::Operator,
                host: Vec::new(),
                life: None,
                out,
            },
        };
        let screen = Screen::new(crate::screen::Format::Json, true);
        let out = folder.path().join("ada.pem");
        run(command(out.clone()), &home, screen).unwrap();
        run(command(folder.path().join("nowhere/ada.pem")), &home, screen).unwrap_err();
        let log = Log::read(&site).unwrap();
        let records: Vec<_> = log.records().map(|(_, record)| record).collect();
        let actions: Vec<_> = records.iter().rev().map(|record| record.action.as_str()).collect();
        assert_eq!(actions, ["pki.issue", "pki.issue", "pki.issue.failed"]);
        let issued = records[2];
        assert_eq!(issued.subject, "spiffe://test/person/ada/operator");
        let read = Certificate::of_pem(&kiln_secret::read(&out).unwrap()).unwrap();
        assert_eq!(issued.after, document(&read, &out));
        let text = std::fs::read_to_string(crate::site::ledger::path(&site)).unwrap();
        assert!(!text.contains("PRIVATE KEY"), "{text}");
    }
}
