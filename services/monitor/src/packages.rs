//! Looks at the archives that images were made from: where a release file is another one than a lock was resolved
//! from, the builder plans, and packages that differ are a signal.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use kiln_api::builder::{PackageChange, Plan};
use kiln_model::cause::CauseKind;
use kiln_model::definition::Mode;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_model::name::ServerName;
use kiln_model::release_file::ReleaseFile;
use kiln_model::signal::Remedy;
use kiln_monitor_core::signal::Observation;
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::shutdown;
use kiln_store::{Error, Store};
use tokio::sync::watch;

use crate::documents::KnownServer;
use crate::metrics;
use crate::ports::{Archive, Builder};
use crate::servers::Servers;
use crate::signals::{Scope, Signals};

/// Release files that are fetched, or plans that are asked for, at once.
const AT_ONCE: usize = 4;

/// A plan that failed is not asked for again sooner.
const PLAN_PAUSE: Duration = Duration::from_secs(60);

/// Lines of evidence: a point release of a distribution touches hundreds of packages.
const EVIDENCE: usize = 50;

/// How a server's archives were found at the last look.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub polled: Option<Timestamp>,
    pub problem: String,
}

#[derive(Debug, Default)]
struct Seen {
    files: HashMap<String, Result<ReleaseFile, String>>,
    polled: Option<Timestamp>,
    plans: HashMap<ServerName, Planned>,
}

/// What was planned for a server last.
#[derive(Debug, Clone)]
struct Planned {
    /// Of everything that the plan depends on, as far as is known here.
    key: Digest,
    /// Why there was none, and when to try again.
    failed: Option<(String, Duration)>,
}

/// Cheap to clone; every clone is the same.
#[derive(Clone)]
pub struct Packages<S, C> {
    archive: Arc<dyn Archive>,
    builder: Arc<dyn Builder>,
    servers: Servers<S>,
    signals: Signals<S, C>,
    clock: C,
    members: Members,
    period: Duration,
    seen: Arc<Mutex<Seen>>,
}

impl<S: Store, C: Clock> Packages<S, C> {
    pub fn new(
        archive: Arc<dyn Archive>,
        builder: Arc<dyn Builder>,
        servers: Servers<S>,
        signals: Signals<S, C>,
        clock: C,
        members: Members,
        period: Duration,
    ) -> Self {
        Self { archive, builder, servers, signals, clock, members, period, seen: Arc::default() }
    }

    pub fn status(&self, server: &KnownServer) -> Status {
        let seen = self.seen();
        let files = server
            .release_files
            .iter()
            .filter_map(|pinned| Some((&pinned.url, seen.files.get(&pinned.url)?)));
        let mut problems: Vec<String> =
            files.filter_map(|(url, file)| Some(format!("{url}: {}", file.as_ref().err()?))).collect();
        let plan = seen.plans.get(&server.name).and_then(|planned| planned.failed.as_ref());
        problems.extend(plan.map(|(problem, _)| problem.clone()));
        let polled = seen.polled.filter(|_| !server.release_files.is_empty());
        Status { polled, problem: problems.join("; ") }
    }

    /// Looks at the archives by period, and at what follows from them at every change of a server or of who
    /// is there, until told to stop.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.servers.changes();
        let mut others = self.members.changes();
        let mut next = self.clock.now().monotonic;
        while !*stop.borrow() {
            changes.mark_unchanged();
            others.mark_unchanged();
            let work = async {
                if self.clock.now().monotonic >= next {
                    next = self.clock.now().monotonic + self.period;
                    self.fetch(|_| true).await;
                } else {
                    // A server that is new may name an archive that nobody looked at.
                    self.fetch(|url| !self.seen().files.contains_key(url)).await;
                }
                self.judge().await;
            };
            tokio::select! {
                biased;
                () = shutdown::requested(&mut stop) => return,
                () = work => {}
            }
            let pause = next.saturating_sub(self.clock.now().monotonic);
            tokio::select! {
                biased;
                () = shutdown::requested(&mut stop) => return,
                _ = changes.changed() => {}
                Ok(()) = others.changed() => {}
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    async fn fetch(&self, wanted: impl Fn(&str) -> bool) {
        let servers = self.servers.all();
        let urls: BTreeSet<&str> = servers
            .iter()
            .flat_map(|server| &server.release_files)
            .map(|pinned| pinned.url.as_str())
            .collect();
        self.seen().files.retain(|url, _| urls.contains(url.as_str()));
        let fetches = urls.into_iter().filter(|url| wanted(url)).map(|url| async move {
            let fetched = self.archive.release_file(url).await;
            metrics::polled("archive", fetched.is_ok());
            if let Err(problem) = &fetched {
                tracing::warn!(url, %problem, "an archive could not be looked at");
            }
            let fetched = fetched.map_err(|problem| problem.0);
            self.seen().files.insert(url.to_owned(), fetched);
        });
        let fetches: Vec<_> = fetches.collect();
        if fetches.is_empty() {
            return;
        }
        futures::stream::iter(fetches).buffer_unordered(AT_ONCE).collect::<()>().await;
        self.seen().polled = Some(self.clock.now().wall);
    }

    async fn judge(&self) {
        let servers = self.servers.all();
        let names: BTreeSet<&ServerName> = servers.iter().map(|server| &server.name).collect();
        self.seen().plans.retain(|name, _| names.contains(name));
        let now = self.clock.now().monotonic;
        let mine = servers.iter().filter(|server| self.members.is_mine(server.name.as_str(), now));
        let judgements = mine.map(|server| async move {
            if let Err(error) = self.judge_one(server).await {
                tracing::warn!(server = %server.name, %error, "the signals of a server could not be written");
            }
        });
        // A plan may take minutes: it keeps no other server waiting.
        let judgements: Vec<_> = judgements.collect();
        futures::stream::iter(judgements).buffer_unordered(AT_ONCE).collect::<()>().await;
    }

    async fn judge_one(&self, server: &KnownServer) -> Result<(), Error> {
        let scope = Scope::Cause(server.name.clone(), CauseKind::PackageUpdates);
        let files: Vec<Option<ReleaseFile>> = {
            let seen = self.seen();
            let file = |url: &String| seen.files.get(url).and_then(|file| file.as_ref().ok()).copied();
            server.release_files.iter().map(|pinned| file(&pinned.url)).collect()
        };
        let moved = |(pinned, file): &(&crate::ports::Pinned, &Option<ReleaseFile>)| {
            file.is_some_and(|file| file.digest != pinned.digest)
        };
        let moved: Vec<_> = server.release_files.iter().zip(&files).filter(moved).collect();
        if server.update.packages == Mode::Never {
            return self.signals.see(&scope, &[]).await;
        }
        if moved.is_empty() {
            // An archive that was not reached says nothing.
            return if files.contains(&None) { Ok(()) } else { self.signals.see(&scope, &[]).await };
        }
        let key = key(server, &files);
        let now = self.clock.now();
        if let Some(planned) = self.seen().plans.get(&server.name)
            && planned.key == key
            && planned.failed.as_ref().is_none_or(|(_, again)| now.monotonic < *again)
        {
            return Ok(());
        }
        let since = moved.iter().filter_map(|(_, file)| file.as_ref()?.date).max().unwrap_or(now.wall);
        let planned = match self.builder.plan(&server.name).await {
            Ok(plan) => {
                let observed = updates(server, &plan, key, since);
                self.signals.see(&scope, observed.as_slice()).await?;
                Planned { key, failed: None }
            }
            Err(problem) => {
                tracing::warn!(server = %server.name, %problem, "there is no plan for an archive that changed");
                let pause = PLAN_PAUSE.max(self.period);
                Planned { key, failed: Some((problem.0, self.clock.now().monotonic + pause)) }
            }
        };
        self.seen().plans.insert(server.name.clone(), planned);
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // No code that can panic runs under the lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same archives, lock and definition give the same plan: it is asked for once.
fn key(server: &KnownServer, files: &[Option<ReleaseFile>]) -> Digest {
    let mut text = format!("{:?}\n", server.definition);
    for (pinned, file) in server.release_files.iter().zip(files) {
        let found = file.map_or(pinned.digest, |file| file.digest);
        text.push_str(&format!("{} {} {found}\n", pinned.url, pinned.digest));
    }
    Digest::of(text.as_bytes())
}

fn updates(server: &KnownServer, plan: &Plan, key: Digest, since: Timestamp) -> Option<Observation> {
    if plan.packages.is_empty() {
        return None;
    }
    let mut evidence: Vec<String> = plan.packages.iter().take(EVIDENCE).map(line).collect();
    if plan.packages.len() > EVIDENCE {
        evidence.push(format!("and {} more", plan.packages.len() - EVIDENCE));
    }
    let fingerprint = match plan.release_file_digest.as_str() {
        "" => key.to_string(),
        digest => digest.to_owned(),
    };
    Some(Observation {
        server: server.name.clone(),
        cause: CauseKind::PackageUpdates,
        fingerprint,
        remedy: Remedy::Rebuild,
        evidence,
        instance: None,
        since,
        reporter: Service::Monitor.to_string(),
        generation: server.generation,
    })
}

fn line(change: &PackageChange) -> String {
    match (change.from.as_str(), change.to.as_str()) {
        ("", to) => format!("{} {to} is new", change.name),
        (from, "") => format!("{} {from} goes", change.name),
        (from, to) => format!("{} {from} -> {to}", change.name),
    }
}
