//! `kiln token`

use std::fs::File;
use std::io::Read as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use kiln_service::access::{PersonName, Role, Secret, Token as Kept, TokenFile};
use kiln_service::config::{Site, lifetime};
use serde::Serialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::{Screen, bad, good, plain, write_all};
use crate::site::ledger::{Deed, Ledger};
use crate::site::{self, keys};

#[derive(Debug, Args)]
pub(crate) struct Token {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token for a person or a program, and show it: it is kept nowhere
    Create {
        /// Whose it is; the audit record has this name
        name: PersonName,
        /// viewer, operator or admin
        #[arg(long, value_name = "ROLE")]
        role: Role,
        /// How long it is good, such as 12h or 90d
        #[arg(long, value_name = "DURATION", value_parser = lifetime, default_value = "30d")]
        expires: Duration,
    },
    /// Show the tokens that were made, without their secrets
    List,
    /// Take a token back; the services refuse it within a second
    Revoke {
        /// The token's id, as the list shows it
        id: String,
    },
}

pub(crate) fn run(it: Token, home: &Home, screen: Screen) -> Outcome {
    let site = site::load(home)?;
    match it.command {
        TokenCommand::Create { name, role, expires } => create(&site, name, role, expires, screen),
        TokenCommand::List => list(&site, screen),
        TokenCommand::Revoke { id } => revoke(&site, &id, screen),
    }
}

fn create(site: &Site, name: PersonName, role: Role, expires: Duration, screen: Screen) -> Outcome {
    let what = "making a token";
    let mut random = Zeroizing::new([0; 32]);
    // The kernel's own source, asked directly: it must not be guessed.
    File::open("/dev/urandom").and_then(|mut it| it.read_exact(random.as_mut_slice())).during(what)?;
    let secret = Secret::of(&random);
    let now = Timestamp::now();
    let until = now.checked_add(expires).map_err(|error| Failure::new(Code::Invalid, what, error))?;
    let token = Kept::new(&secret, name, role, now, until)
        .map_err(|error| Failure::new(Code::Invalid, what, error))?;
    let id = token.id.clone();
    let mut ledger = Ledger::open(site)?;
    let mut file = read(site)?;
    let deed =
        Deed { action: "token.create", subject: id.clone(), before: Value::Null, after: document(&token) };
    // One that has expired is refused anyway.
    file.token.retain(|token| token.expires > now);
    file.token.push(token);
    ledger.carry_out(&deed, || write(site, &file))?;
    if screen.is_json() {
        return write_all(&Made { expires: until, id: &id, token: secret.reveal() }.line()?);
    }
    screen.progress(format_args!("token {id}, good until {until}; it is shown this once:"));
    write_all(Zeroizing::new([secret.reveal(), "\n"].concat()).as_bytes())
}

/// A new token as a document.
#[derive(Serialize)]
struct Made<'a> {
    expires: Timestamp,
    id: &'a str,
    token: &'a str,
}

impl Made<'_> {
    /// Not by way of a `Value` or of a text that grows: they leave copies of the token that nobody wipes.
    fn line(&self) -> Outcome<Zeroizing<Vec<u8>>> {
        // The names, the quotes and a time are less than half of it.
        const ROOM: usize = 256;
        let mut line = Zeroizing::new(Vec::with_capacity(ROOM + self.id.len() + self.token.len()));
        serde_json::to_writer(&mut *line, self)
            .map_err(|error| Failure::failed("writing the new token", error))?;
        line.push(b'\n');
        Ok(line)
    }
}

fn revoke(site: &Site, id: &str, screen: Screen) -> Outcome {
    let mut ledger = Ledger::open(site)?;
    let mut file = read(site)?;
    let Some(place) = file.token.iter().position(|token| token.id == id) else {
        return Err(
            Failure::new(Code::NotFound, format!("there is no token {id}"), "").todo("kiln token list")
        );
    };
    let token = file.token.remove(place);
    let deed =
        Deed { action: "token.revoke", subject: id.to_owned(), before: document(&token), after: Value::Null };
    ledger.carry_out(&deed, || write(site, &file))?;
    screen.json(&json!({ "revoked": id }))?;
    screen.line(format_args!("token {id} is revoked"))
}

/// What may be seen of it.
fn document(it: &Kept) -> Value {
    json!({
        "id": it.id,
        "name": it.name.as_str(),
        "role": it.role.as_str(),
        "created": it.created.to_string(),
        "expires": it.expires.to_string(),
    })
}

fn list(site: &Site, screen: Screen) -> Outcome {
    let file = read(site)?;
    let documents: Vec<_> = file.token.iter().map(document).collect();
    screen.json(&json!({ "tokens": documents }))?;
    if file.token.is_empty() {
        return screen.line("No tokens");
    }
    let now = Timestamp::now();
    let rows = file.token.iter().map(|it| {
        let state = if it.expires > now { good("good") } else { bad("expired") };
        vec![plain(&it.id), plain(&it.name), plain(it.role), state, plain(it.expires)]
    });
    screen.table(&["TOKEN", "NAME", "ROLE", "STATE", "EXPIRES"], rows.collect())
}

fn read(site: &Site) -> Outcome<TokenFile> {
    let path = site.paths().tokens();
    let what = format!("reading {}", path.display());
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.during(&what)?,
    };
    TokenFile::parse(&text).map_err(|why| Failure::new(Code::Invalid, what, why).reason("bad_tokens"))
}

/// Of whoever has the ledger.
fn write(site: &Site, file: &TokenFile) -> Outcome {
    let path = site.paths().tokens();
    let text = file.to_text().map_err(|why| Failure::failed(format!("changing {}", path.display()), why))?;
    keys::write(&path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::screen::Format;
    use crate::site::create::{Wishes, ensure as make};
    use crate::site::ledger::{self, Log};

    #[test]
    fn a_new_token_is_one_line_of_json_that_was_never_moved() {
        let secret = Secret::of(&[7; 32]);
        let expires = "2026-02-01T00:00:00.123456789Z".parse().unwrap();
        let line = Made { expires, id: "1a2b3c4d", token: secret.reveal() }.line().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let expected = json!({ "id": "1a2b3c4d", "token": secret.reveal(), "expires": "2026-02-01T00:00:00.123456789Z" });
        assert_eq!(document, expected);
        assert!(line.ends_with(b"}\n") && line.len() <= 256, "{}", line.len());
    }

    #[test]
    fn who_gave_and_took_a_token_is_recorded_and_nothing_that_lets_anybody_in() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home")), "test").unwrap();
        let site = make(&home, &Wishes { nats_url: None, store: None, settings: Vec::new() }).unwrap();
        let screen = Screen::new(Format::Json, true);
        create(&site, "ada".parse().unwrap(), Role::Viewer, Duration::from_secs(3600), screen).unwrap();
        let made = read(&site).unwrap().token.remove(0);
        revoke(&site, &made.id, screen).unwrap();
        revoke(&site, &made.id, screen).unwrap_err();
        let log = Log::read(&site).unwrap();
        let records: Vec<_> = log.records().map(|(_, record)| record).collect();
        let [revoked, created] = records[..] else { panic!("{records:?}") };
        assert_eq!((created.action.as_str(), &created.subject), ("token.create", &made.id));
        assert_eq!((&created.before, &created.after), (&Value::Null, &document(&made)));
        assert_eq!((revoked.action.as_str(), &revoked.subject), ("token.revoke", &made.id));
        assert_eq!((&revoked.before, &revoked.after), (&document(&made), &Value::Null));
        let text = std::fs::read_to_string(ledger::path(&site)).unwrap();
        assert!(!text.contains(&made.hash) && !text.contains("kiln_"), "{text}");
    }
}
