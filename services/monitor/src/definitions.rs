//! Looks at the Git repositories that definitions come from: a branch that moved is inspected by the builder, and each
//! definition that differs is a signal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kiln_api::builder::{InspectSourceResponse, InspectedServer, Source};
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_model::name::ServerName;
use kiln_model::signal::Remedy;
use kiln_monitor_core::signal::Observation;
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::shutdown;
use kiln_store::{Error, Store};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::documents::KnownServer;
use crate::metrics;
use crate::ports::{Builder, Git, Listing, Problem};
use crate::servers::Servers;
use crate::signals::{Scope, Signals};

/// Repositories that are asked at once: each is a process, and a connection.
const AT_ONCE: usize = 8;

/// A repository that fails is asked less often, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a repository was found at the last look.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub polled: Option<Timestamp>,
    pub problem: String,
    /// What is wrong with single definitions in it: the server's name, empty where even that can't be read, and why.
    pub refused: Vec<(String, String)>,
}

impl Status {
    /// What keeps a server from following its repository; empty where nothing does.
    pub fn problem_of(&self, server: &str) -> String {
        let whole = Some(self.problem.as_str()).filter(|problem| !problem.is_empty());
        let refused = self.refused.iter().filter(|(name, _)| name.is_empty() || name == server);
        whole.into_iter().chain(refused.map(|(_, problem)| problem.as_str())).collect::<Vec<_>>().join("; ")
    }
}

struct Watched {
    url: String,
    branch: String,
    servers: BTreeSet<String>,
    status: Status,
    /// The head that the builder inspected last.
    inspected: Option<String>,
    ended: CancellationToken,
    wake: Arc<Notify>,
}

/// Cheap to clone; every clone is the same.
#[derive(Clone)]
pub struct Definitions<S, C> {
    git: Arc<dyn Git>,
    builder: Arc<dyn Builder>,
    servers: Servers<S>,
    signals: Signals<S, C>,
    clock: C,
    members: Members,
    period: Duration,
    watched: Arc<Mutex<BTreeMap<String, Watched>>>,
    permits: Arc<Semaphore>,
}

impl<S: Store, C: Clock> Definitions<S, C> {
    pub fn new(
        git: Arc<dyn Git>,
        builder: Arc<dyn Builder>,
        servers: Servers<S>,
        signals: Signals<S, C>,
        clock: C,
        members: Members,
        period: Duration,
    ) -> Self {
        let (watched, permits) = (Arc::default(), Arc::new(Semaphore::new(AT_ONCE)));
        Self { git, builder, servers, signals, clock, members, period, watched, permits }
    }

    /// The last look at the repository of a server.
    pub fn status(&self, source: &str) -> Option<Status> {
        self.watched().get(source).map(|watched| watched.status.clone())
    }

    /// Watches these repositories, and no others.
    pub fn take(&self, listing: Listing<Source>) {
        let mut there = BTreeSet::new();
        for source in listing.items {
            let Some(git) = source.git else { continue };
            // Nothing of it is deployed any more.
            if source.servers.is_empty() {
                continue;
            }
            there.insert(source.id.clone());
            let servers: BTreeSet<String> = source.servers.into_iter().collect();
            let mut watched = self.watched();
            if let Some(known) = watched.get_mut(&source.id) {
                if known.servers != servers {
                    // Its head is compared with what is in force now.
                    known.servers = servers;
                    known.inspected = None;
                    known.wake.notify_one();
                }
                continue;
            }
            let (ended, wake) = (CancellationToken::new(), Arc::new(Notify::new()));
            watched.insert(
                source.id.clone(),
                Watched {
                    url: git.url,
                    branch: git.branch,
                    servers,
                    status: Status::default(),
                    inspected: None,
                    ended: ended.clone(),
                    wake: wake.clone(),
                },
            );
            drop(watched);
            tokio::spawn(self.clone().attend(source.id, ended, wake));
        }
        self.watched().retain(|id, watched| {
            if !there.contains(id) {
                watched.ended.cancel();
            }
            there.contains(id)
        });
    }

    /// Resolves signals whose definition is in force by now, or whose server is no more, at every change of a server
    /// until told to stop.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.servers.changes();
        while !*stop.borrow() {
            changes.mark_unchanged();
            if let Err(error) = self.settle().await {
                tracing::warn!(%error, "signals could not be settled");
            }
            tokio::select! {
                biased;
                () = shutdown::requested(&mut stop) => break,
                _ = changes.changed() => {}
                () = self.clock.sleep(LONGEST_PAUSE) => {}
            }
        }
        self.take(Listing { epoch: String::new(), items: Vec::new() });
    }

    async fn settle(&self) -> Result<(), Error> {
        self.signals
            .settle(|record| {
                let signal = &record.signal;
                let in_force = |digest: Digest| digest.to_string() == signal.fingerprint;
                match self.servers.get(&signal.server) {
                    Some(server) => {
                        signal.cause == CauseKind::DefinitionChanged
                            && server.definition.is_some_and(in_force)
                    }
                    // What is removed needs no update. Its instances' signals end with them.
                    None => signal.remedy == Remedy::Rebuild,
                }
            })
            .await?;
        let open =
            self.signals.live().into_iter().filter(|record| record.signal.cause == CauseKind::Reported);
        for record in open {
            if let Some(server) = self.servers.get(&record.signal.server) {
                self.signals.answered(&server.name, "", server.generation).await?;
            }
        }
        Ok(())
    }

    async fn attend(self, source: String, ended: CancellationToken, wake: Arc<Notify>) {
        let mut failures = 0_u32;
        let mut others = self.members.changes();
        loop {
            others.borrow_and_update();
            let pause = if self.members.is_mine(&source, self.clock.now().monotonic) {
                tokio::select! {
                    biased;
                    () = ended.cancelled() => return,
                    pause = self.attend_once(&source, &mut failures) => pause,
                }
            } else {
                self.period
            };
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                () = wake.notified() => {}
                // It may be this one's to look at now, and a period is too long to wait for that.
                Ok(()) = others.changed() => {}
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    /// Looks, and gives the pause until the next look.
    async fn attend_once(&self, source: &str, failures: &mut u32) -> Duration {
        let looked = self.look(source).await;
        metrics::polled("git", looked.is_ok());
        let pause = match &looked {
            Ok(()) => {
                *failures = 0;
                self.period
            }
            Err(problem) => {
                if *failures == 0 {
                    tracing::warn!(source, %problem, "a repository could not be looked at");
                }
                *failures = failures.saturating_add(1);
                let longer = self.period * 2_u32.saturating_pow((*failures).min(8));
                longer.min(LONGEST_PAUSE).max(self.period)
            }
        };
        self.note(source, looked.err());
        pause
    }

    fn note(&self, source: &str, problem: Option<Problem>) {
        let now = self.clock.now().wall;
        if let Some(watched) = self.watched().get_mut(source) {
            watched.status.polled = Some(now);
            watched.status.problem = problem.map(|problem| problem.0).unwrap_or_default();
        }
    }

    async fn look(&self, source: &str) -> Result<(), Problem> {
        let Some((url, branch, inspected)) = self
            .watched()
            .get(source)
            .map(|watched| (watched.url.clone(), watched.branch.clone(), watched.inspected.clone()))
        else {
            return Ok(());
        };
        // Never closed.
        let _permit = self.permits.acquire().await;
        let head = self.git.head(&url, &branch).await?;
        if inspected.as_ref() == Some(&head) {
            return Ok(());
        }
        let seen = self.clock.now().wall;
        let inspection = self.builder.inspect(source).await?;
        // What the builder saw may be newer than what was seen here; then the next look finds out.
        let commit = if inspection.commit.is_empty() { head } else { inspection.commit.clone() };
        let raised = self.raise(source, &commit, seen, inspection).await.map_err(|error| {
            Problem(format!("the signals of the repository could not be written: {error}"))
        })?;
        if let Some(watched) = self.watched().get_mut(source) {
            watched.inspected = raised.whole.then_some(commit);
            watched.status.refused = raised.refused;
        }
        Ok(())
    }

    /// Makes the signals of a source's servers what an inspection calls for.
    async fn raise(
        &self,
        source: &str,
        commit: &str,
        seen: Timestamp,
        inspection: InspectSourceResponse,
    ) -> Result<Raised, Error> {
        let mut refused = Vec::new();
        let mut inspected: BTreeMap<ServerName, InspectedServer> = BTreeMap::new();
        for server in inspection.servers {
            if !server.problem.is_empty() {
                refused.push((server.name.clone(), server.problem.clone()));
            }
            if let Ok(name) = server.name.parse() {
                inspected.insert(name, server);
            }
        }
        let servers = self.watched().get(source).map(|watched| watched.servers.clone()).unwrap_or_default();
        let mut whole = true;
        for name in servers.iter().filter_map(|name| name.parse::<ServerName>().ok()) {
            let Some(known) = self.servers.get(&name) else {
                whole = false;
                continue;
            };
            let server = inspected.get(&name);
            let in_force = known.definition.map(|digest| digest.to_string()).unwrap_or_default();
            whole &= server.is_none_or(|server| server.current_digest == in_force);
            let observed = server.and_then(|server| changed(&known, server, commit, seen));
            let scope = Scope::Cause(name, CauseKind::DefinitionChanged);
            self.signals.see(&scope, observed.as_slice()).await?;
        }
        Ok(Raised { refused, whole })
    }

    fn watched(&self) -> MutexGuard<'_, BTreeMap<String, Watched>> {
        // No code that can panic runs under the lock.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of an inspection.
struct Raised {
    /// As in [`Status`].
    refused: Vec<(String, String)>,
    /// False where the builder has not told of a server yet, whose policy says whether a commit is followed, or has told
    /// of another definition than it inspected with: one of the two is older. Then the next look has to decide.
    whole: bool,
}

/// Whether a server's definition at the head is another one than the builder took.
fn changed(
    known: &KnownServer,
    server: &InspectedServer,
    commit: &str,
    seen: Timestamp,
) -> Option<Observation> {
    // One that can't be taken is told of as a problem; one that was never applied, or was removed, is not ours.
    let differs = server.problem.is_empty()
        && !server.current_digest.is_empty()
        && server.current_digest != server.definition_digest;
    let digest: Digest = server.definition_digest.parse().ok()?;
    // Taken while it was inspected.
    let in_force = known.definition == Some(digest);
    if !differs || in_force {
        return None;
    }
    let current = server.current_digest.parse::<Digest>().map(|digest| digest.short()).unwrap_or_default();
    let short = commit.get(..12).unwrap_or(commit);
    Some(Observation {
        server: known.name.clone(),
        cause: CauseKind::DefinitionChanged,
        fingerprint: digest.to_string(),
        remedy: Remedy::Rebuild,
        evidence: vec![format!("commit {short}: definition {current} -> {}", digest.short())],
        instance: None,
        since: seen,
        reporter: Service::Monitor.to_string(),
        generation: known.generation,
    })
}
