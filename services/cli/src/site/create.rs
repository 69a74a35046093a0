//! Making the site's folder, and changing its settings.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;

use kiln_model::event::Service;
use kiln_service::config::{NatsFile, Site, SiteFile};
use rand::Rng as _;
use toml_edit::{DocumentMut, Item, Table};

use super::{broker, keys, network, pki, supervisor};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;

/// What `kiln up` was told beside the site's name.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// A broker that is there already.
    pub(crate) nats_url: Option<String>,
    /// A database in the place of files.
    pub(crate) store: Option<String>,
    /// `poll.git` and `1s`.
    pub(crate) settings: Vec<(String, String)>,
}

/// The site with its settings, made where it did not exist.
pub(crate) fn ensure(home: &Home, wishes: &Wishes) -> Outcome<Site> {
    let folder = home.folder();
    let what = format!("making the site's folder {}", folder.display());
    DirBuilder::new().recursive(true).mode(0o700).create(folder).during(&what)?;
    let path = home.site_file();
    let there = path.exists();
    let old = if there {
        std::fs::read_to_string(&path).during(format_args!("reading {}", path.display()))?
    } else {
        text(&fresh(home)?)?
    };
    let nats_url = match &wishes.nats_url {
        Some(url) => Some(url.clone()),
        None => broker::outgrown(folder)?,
    };
    let (file, new) = changed(&old, wishes, nats_url.as_deref()).map_err(|why| {
        Failure::new(Code::Invalid, format!("the settings in {}", path.display()), why).reason("bad_config")
    })?;
    if there && has_other_store(&old, &file) {
        return Err(Failure::new(
            Code::Refused,
            "changing where the site keeps its state",
            "what it keeps now would be left behind: no release, no history, and instances that nobody knows",
        )
        .reason("other_store")
        .todo("choose the store when the site is made: kiln --site NEW up --store URL"));
    }
    if new.is_some() && Site::load(folder).is_ok_and(|site| supervisor::running(&site).is_some()) {
        return Err(Failure::new(
            Code::Refused,
            "changing the site's settings",
            "its services read them when they start",
        )
        .reason("running")
        .todo("kiln down --keep-instances, then this again: the instances serve on meanwhile"));
    }
    let folder = folder.canonicalize().during(&what)?;
    let site = file
        .check(&folder)
        .map_err(|error| Failure::new(Code::Invalid, "the site's settings", error).reason("bad_config"))?;

    let paths = site.paths();
    let mut folders = vec![
        paths.run(),
        paths.keys(),
        paths.keys().join("nats"),
        paths.pki(),
        paths.nats(),
        paths.logs(),
        paths.images(),
    ];
    folders.extend(Service::ALL.map(|service| paths.service(service)));
    for folder in folders {
        let what = format!("making {}", folder.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).during(what)?;
    }
    keys::ensure(paths)?;
    // Before the certificates: the broker gets one where it is the site's own.
    broker::write(&site, wishes.nats_url.is_some())?;
    pki::ensure(&site)?;
    // Last: a folder with a site.toml is a whole one.
    if new.is_some() || !there {
        keys::write(&path, new.as_ref().unwrap_or(&old))?;
    }
    Ok(site)
}

fn text(file: &SiteFile) -> Outcome<String> {
    file.to_text().map_err(|error| Failure::failed("writing the site's settings", error))
}

fn fresh(home: &Home) -> Outcome<SiteFile> {
    let id: String = format!("{:08x}", rand::rng().random::<u32>());
    // The kernel's names of network interfaces have at most 15 characters.
    let bridge = format!("kiln-{}", &id[..6]);
    let others: Vec<_> = Home::all().iter().filter_map(|folder| Site::load(folder).ok()).collect();
    let mut ports = network::free_ports(1 + Service::ALL.len(), &network::ports(&others))?.into_iter();
    let mut address = || format!("127.0.0.1:{}", ports.next().unwrap_or_default());
    let nats = NatsFile { url: format!("tls://{}", address()), replicas: 1 };
    Ok(SiteFile {
        name: home.name().to_string(),
        subnet: network::free_subnet(&others)?,
        bridge,
        id,
        log: "info".to_owned(),
        nats,
        store: None,
        otlp: None,
        metrics: Service::ALL.into_iter().map(|service| (service, address())).collect(),
        listen: Default::default(),
        peers: Default::default(),
        nodes: Default::default(),
        registry: None,
        pki: Default::default(),
        poll: Default::default(),
        builder: Default::default(),
        signing: Default::default(),
        secrets: Default::default(),
        credentials: Default::default(),
    })
}

/// The settings with what was wished for put in, and their new text where that changes anything. What a person wrote
/// beside the settings stays.
fn changed(old: &str, wishes: &Wishes, nats_url: Option<&str>) -> Result<(SiteFile, Option<String>), String> {
    let mut document: DocumentMut =
        old.parse().map_err(|error: toml_edit::TomlError| error.message().to_owned())?;
    let named = [("nats.url", nats_url), ("store.url", wishes.store.as_deref())];
    let named = named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())));
    for (key, value) in named.chain(wishes.settings.iter().cloned()) {
        set(&mut document, &key, &value)?;
    }
    let new = document.to_string();
    let file = SiteFile::parse(&new)?;
    // A wish for what is so already changes nothing, however it is written.
    let values = |file: &SiteFile| file.to_text().map_err(|error| error.to_string());
    let same = match SiteFile::parse(old) {
        Ok(before) => values(&before)? == values(&file)?,
        Err(_) => false,
    };
    Ok((file, (!same).then_some(new)))
}

/// A site that is there can be told of another address of its database in site.toml alone, by who moved it.
fn has_other_store(old: &str, new: &SiteFile) -> bool {
    let url = |file: &SiteFile| file.store.as_ref().map(|store| store.url.clone());
    SiteFile::parse(old).is_ok_and(|old| url(&old) != url(new))
}

/// `poll.git` is the key `git` of the table `poll`.
fn set(table: &mut Table, key: &str, value: &str) -> Result<(), String> {
    match key.split_once('.') {
        Some((first, rest)) => {
            let inner = table.entry(first).or_insert_with(|| Item::Table(Table::new()));
            let inner = inner.as_table_mut().ok_or_else(|| format!("`{first}` holds no further settings"))?;
            set(inner, rest, value)
        }
        None => {
            // Only numbers are written as such; all other settings are texts.
            let mut new: toml_edit::Value =
                value.parse::<i64>().map_or_else(|_| value.into(), toml_edit::Value::from);
            // A comment behind the old value is on the line still.
            if let Some(old) = table.get(key).and_then(Item::as_value) {
                *new.decor_mut() = old.decor().clone();
            }
            table.insert(key, Item::Value(new));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kiln_service::access::Role;
    use kiln_service::guard::Guard;

    use super::*;

    fn home(folder: &Path) -> Home {
        Home::new(Some(folder.join("home")), "test").unwrap()
    }

    #[test]
    fn a_site_is_made_once_and_keeps_its_identity() {
        let folder = tempfile::tempdir().unwrap();
        let first = ensure(&home(folder.path()), &Wishes::default()).unwrap();
        let key = std::fs::read_to_string(first.paths().signing_key()).unwrap();
        let again = ensure(&home(folder.path()), &Wishes::default()).unwrap();
        assert_eq!(
            (&first.id, first.subnet.network(), &first.nats_url),
            (&again.id, again.subnet.network(), &again.nats_url)
        );
        assert_eq!(key, std::fs::read_to_string(again.paths().signing_key()).unwrap());
        assert!(kiln_image::read_signing_key(&again.paths().signing_key()).is_ok());
        assert!(kiln_image::read_trusted_key(&again.paths().signing_pub()).is_ok());
        let config = std::fs::read_to_string(broker::config_file(&again)).unwrap();
        assert!(config.contains("nkey:") && config.contains(again.nats_url.trim_start_matches("tls://")));
    }

    #[test]
    fn nobody_else_may_look_into_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let site = ensure(&home(folder.path()), &Wishes::default()).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&site.home), 0o700);
        assert_eq!(mode(&site.paths().run()), 0o700);
        assert_eq!(mode(&site.paths().signing_key()), 0o600);
        assert_eq!(mode(&site.paths().nats_seed(kiln_bus::User::Admin)), 0o600);
        assert_eq!(mode(&broker::config_file(&site)), 0o600);
    }

    #[test]
    fn settings_are_changed_by_their_names_and_bad_ones_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let with = |key: &str, value: &str| {
            ensure(&home, &Wishes { settings: vec![(key.to_owned(), value.to_owned())], ..Wishes::default() })
        };
        let site = with("poll.git", "1s").unwrap();
        assert_eq!(site.poll.git.as_secs(), 1);
        assert_eq!(with("builder.workers", "3").unwrap().builder.workers, 3);
        assert_eq!(
            with("otlp.endpoint", "http://127.0.0.1:4317").unwrap().otlp.unwrap(),
            "http://127.0.0.1:4317"
        );
        for (key, value) in [("poll.gti", "1s"), ("poll.git", "1"), ("name.x", "y"), ("nonsense", "1")] {
            assert!(with(key, value).is_err(), "{key}={value}");
        }
        let site = Site::load(home.folder()).unwrap();
        assert_eq!((site.poll.git.as_secs(), site.builder.workers), (1, 3));
    }

    #[test]
    fn what_a_person_wrote_beside_the_settings_stays() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let wish = |key: &str, value: &str| Wishes {
            settings: vec![(key.to_owned(), value.to_owned())],
            ..Wishes::default()
        };
        ensure(&home, &wish("poll.git", "2s")).unwrap();
        let text = || std::fs::read_to_string(home.site_file()).unwrap();
        let edited = format!("# ours\n{}", text().replace("git = \"2s\"", "git = '2s' # often"));
        std::fs::write(home.site_file(), &edited).unwrap();
        // Nothing is wished for, or what is so already, also where the file leaves it to the default.
        for wishes in [Wishes::default(), wish("poll.git", "2s"), wish("log", "info")] {
            assert_eq!(changed(&edited, &wishes, None).unwrap().1, None, "{wishes:?}");
            ensure(&home, &wishes).unwrap();
            assert_eq!(text(), edited);
        }
        ensure(&home, &wish("poll.git", "3s")).unwrap();
        assert_eq!(text(), edited.replace("'2s' # often", "\"3s\" # often"));
    }

    #[test]
    fn another_broker_is_given_the_users_and_none_is_started() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let wishes = Wishes { nats_url: Some("nats://127.0.0.1:4222".to_owned()), ..Wishes::default() };
        let site = ensure(&home, &wishes).unwrap();
        assert!(!broker::config_file(&site).exists());
        let site = ensure(&home, &Wishes::default()).unwrap();
        assert!(!broker::config_file(&site).exists() && site.nats_url == "nats://127.0.0.1:4222");
        assert!(site.paths().nats().join("users.conf").exists());
    }

    #[test]
    fn the_store_is_chosen_once_and_its_password_is_never_written() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let wish = |url: &str| Wishes { store: Some(url.to_owned()), ..Wishes::default() };
        let refused = ensure(&home, &wish("postgres://kiln:hunter2@db.example/kiln")).unwrap_err();
        let said = format!("{refused:?}");
        assert!(said.contains("password_file") && !said.contains("hunter2"), "{said}");
        assert!(!home.site_file().exists());

        let site = ensure(&home, &wish("postgres://kiln@db.example/kiln")).unwrap();
        assert_eq!(site.store.unwrap().url.to_string(), "postgres://db.example/kiln");
        ensure(&home, &Wishes::default()).unwrap();
        ensure(&home, &wish("postgres://kiln@db.example/kiln")).unwrap();
        let moved = ensure(&home, &wish("postgres://kiln@other.example/kiln")).unwrap_err();
        assert!(format!("{moved:?}").contains("left behind"), "{moved:?}");
    }

    /// Its services, those of before among them, speak as they began until nothing runs.
    #[test]
    fn a_broker_without_bounds_has_them_from_the_next_start_of_everything_on() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let made = ensure(&home, &Wishes::default()).unwrap();
        let broker = || std::fs::read_to_string(broker::config_file(&made)).unwrap();
        let has_bounds = broker();
        assert!(
            has_bounds.contains("\nmax_pending: 16MB\n") && has_bounds.contains("  max_file_store: 2GB\n")
        );
        let boundless = has_bounds.replace("max_pending: 16MB\n", "");
        std::fs::write(broker::config_file(&made), boundless).unwrap();

        let service = Guard::take(made.paths(), Service::Node).unwrap();
        ensure(&home, &Wishes::default()).unwrap();
        let running = broker();
        assert!(running.contains("\nmax_payload: 4MB\n") && !running.contains("max_pending"), "{running}");
        assert!(running.contains("store_dir:") && !running.contains("max_file_store"), "{running}");
        drop(service);
        ensure(&home, &Wishes::default()).unwrap();
        assert_eq!(broker(), has_bounds);
        // And keeps them, whatever runs.
        let _service = Guard::take(made.paths(), Service::Node).unwrap();
        ensure(&home, &Wishes::default()).unwrap();
        assert_eq!(broker(), has_bounds);
    }

    #[test]
    fn a_broker_of_before_tls_has_it_from_the_next_start_of_everything_on() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let made = ensure(&home, &Wishes::default()).unwrap();
        let settings = || std::fs::read_to_string(home.site_file()).unwrap();
        let broker = || std::fs::read_to_string(broker::config_file(&made)).unwrap();
        let (url, of_before) = (made.nats_url.clone(), made.nats_url.replace("tls://", "nats://"));
        let has_tls = broker();
        assert!(has_tls.contains("verify: true") && has_tls.contains("min_version: \"1.3\""), "{has_tls}");
        let (before, rest) = has_tls.split_once("tls {").unwrap();
        let (_, after) = rest.split_once("}\n").unwrap();
        let plain = format!("{before}{after}");
        std::fs::write(home.site_file(), settings().replace(&url, &of_before)).unwrap();
        std::fs::write(broker::config_file(&made), &plain).unwrap();

        let service = Guard::take(made.paths(), Service::Node).unwrap();
        assert_eq!(ensure(&home, &Wishes::default()).unwrap().nats_url, of_before);
        assert_eq!(broker(), plain);
        drop(service);
        assert_eq!(ensure(&home, &Wishes::default()).unwrap().nats_url, url);
        assert_eq!(broker(), has_tls);
        assert!(settings().contains(&url) && !settings().contains(&of_before));

        // And never back, also under services that run.
        let wish = |url: &str| Wishes {
            settings: vec![("nats.url".to_owned(), url.to_owned())],
            ..Wishes::default()
        };
        let _service = Guard::take(made.paths(), Service::Node).unwrap();
        let refused = format!("{:?}", ensure(&home, &wish(&of_before)).unwrap_err());
        assert!(refused.contains("has TLS") && refused.contains(&url), "{refused}");
        assert!(settings().contains(&url) && broker() == has_tls);
    }

    #[test]
    fn a_broker_that_would_have_no_certificate_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let site = ensure(&home, &Wishes::default()).unwrap();
        let of_broker = site.paths().identity(Role::Broker);
        let text = std::fs::read_to_string(&of_broker).unwrap();
        std::fs::remove_file(pki::authority_key(&site)).unwrap();
        std::fs::remove_file(&of_broker).unwrap();
        let refused = format!("{:?}", ensure(&home, &Wishes::default()).unwrap_err());
        assert!(refused.contains("kiln pki issue broker"), "{refused}");
        std::fs::write(&of_broker, text).unwrap();
        ensure(&home, &Wishes::default()).unwrap();
    }

    #[test]
    fn a_broker_on_another_machine_is_reached_with_tls_alone() {
        let folder = tempfile::tempdir().unwrap();
        let home = home(folder.path());
        let wishes = |url: &str| Wishes { nats_url: Some(url.to_owned()), ..Wishes::default() };
        let refused = format!("{:?}", ensure(&home, &wishes("nats://10.0.0.5:4222")).unwrap_err());
        assert!(
            refused.contains("tls://10.0.0.5:4222") && refused.contains("kiln pki issue broker"),
            "{refused}"
        );
        let site = ensure(&home, &wishes("tls://10.0.0.5:4222")).unwrap();
        assert!(site.nats(kiln_bus::User::Builder).unwrap().tls.is_some());
    }
}
