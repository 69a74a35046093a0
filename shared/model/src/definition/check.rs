//! From what is written to what is meant: what no value can say of itself is checked here, defaults are filled in.

use std::collections::BTreeMap;

use super::from::{self, From};
use super::node::quoted;
use super::number::time_text;
use super::problem::{Place, Problem};
use super::raw;
use super::read::At;
use super::test::{command, http, tcp};
use super::text::{AbsolutePath, FileOrUrl, InnerPath, Text};
use super::{
    ArchivePlace, ArchiveSpec, ContainerfileSpec, Definition, FileSpec, ImageSpec, ProvisionSpec,
    Provisioner, Reach, RunStep, Source, Step, UpdatePolicy,
};
use crate::name::ServerName;
use crate::run::{HealthPolicy, Limits, Port, RolloutPolicy, RunSpec, Strategy};
use crate::time::Millis;

pub(super) const MAX_STEPS: usize = 64;
pub(super) const MAX_FILES: usize = 1000;
pub(super) const MAX_PACKAGES: usize = 2000;
const MAX_TESTS: usize = 64;
const MAX_PORTS: usize = 100;
const MAX_WRITABLE: usize = 100;
const MAX_ARCHIVES: usize = 50;

/// What an image begins with, where no archive goes with it, and what would be right.
#[derive(Clone, Copy)]
struct NoPackages {
    what: &'static str,
    help: &'static str,
}

fn takes_no_packages(from: &Source) -> Option<NoPackages> {
    match from {
        Source::Scratch => Some(NoPackages {
            what: "an image that begins with nothing",
            help: "wanted `from: { debian: SUITE }`",
        }),
        // Which packages it will hold is known once it is built, and is different each time.
        Source::Containerfile(_) => Some(NoPackages {
            what: "what a Containerfile makes",
            help: "do it in the Containerfile, or make that a server of its own and begin with `{ server: NAME }`",
        }),
        Source::Debian { .. } | Source::Archive { .. } | Source::Image { .. } | Source::Server { .. } => None,
    }
}

/// The kernel's own, which an instance has in any case.
const KERNEL_TREES: [&str; 3] = ["/proc", "/sys", "/dev"];

/// What is wrong with the combination of values is added to the problems; the definition is good where there are none.
pub(super) fn check(raw: raw::Definition, places: &[Place], problems: &mut Vec<Problem>) -> Definition {
    let mut checker = Checker { places, problems };
    let name = raw.name.0;
    Definition {
        image: checker.image(raw.image, &name),
        run: checker.run(raw.run),
        update: UpdatePolicy {
            definition: raw.update.on.definition,
            packages: raw.update.on.packages,
            unhealthy: raw.update.on.unhealthy,
            debounce: raw.update.debounce.0,
        },
        name,
    }
}

pub(super) struct Checker<'a> {
    places: &'a [Place],
    problems: &'a mut Vec<Problem>,
}

impl Checker<'_> {
    pub(super) fn place<T>(&self, at: &At<T>) -> Place {
        at.place(self.places, Place::default())
    }

    pub(super) fn problem(&mut self, place: Place, message: impl Into<String>, help: impl Into<String>) {
        // What lies inside of a place was cut out if it was wrong: then the place is only half seen.
        if !self.problems.iter().any(|problem| problem.lies_in(place)) {
            self.problems.push(Problem::new(place, message, Some(help.into())));
        }
    }

    fn at_most<T>(&mut self, max: usize, what: &str, list: &At<Vec<T>>) {
        let count = list.value.len();
        if count > max {
            self.problem(
                self.place(list),
                format!("{count} {what} are too many"),
                format!("wanted at most {max}"),
            );
        }
    }

    fn not_empty<T>(&mut self, list: &At<Vec<T>>, what: &str, help: &str) {
        if list.value.is_empty() {
            self.problem(self.place(list), format!("{what} is empty"), help);
        }
    }

    fn image(&mut self, raw: raw::Image, name: &ServerName) -> ImageSpec {
        self.not_empty(&raw.command, "the command", "wanted a program, such as [nginx, -g, daemon off;]");
        if let Some(program) = raw.command.value.first().filter(|program| program.value.trim().is_empty()) {
            self.problem(self.place(program), "the program's name is empty", "wanted one such as nginx");
        }
        self.at_most(MAX_TESTS, "tests", &raw.tests);
        let from = self.source(raw.from, name);
        let steps = self.steps(raw.steps, takes_no_packages(&from));
        ImageSpec {
            from,
            architecture: raw.architecture,
            steps,
            env: env(raw.env),
            user: raw.user.0,
            command: raw.command.value.into_iter().map(|argument| argument.value).collect(),
            tests: raw.tests.value.into_iter().map(|test| self.test(test)).collect(),
        }
    }

    fn source(&mut self, from: From, name: &ServerName) -> Source {
        match from {
            From::Scratch => Source::Scratch,
            From::Server(parent) => {
                if parent.value.0 == *name {
                    let message = format!("the server `{name}` can't be its own parent");
                    self.problem(self.place(&parent), message, "wanted another server's name");
                }
                Source::Server { name: parent.value.0 }
            }
            From::Debian { suite, variant, archives } => {
                Source::Debian { suite: suite.0, variant, archives: self.archives(archives) }
            }
            From::Archive { place, sha256, archives } => {
                let at = self.place(&place);
                let place = match (place.value.0, sha256) {
                    (FileOrUrl::File(path), None) => ArchivePlace::File(path),
                    (FileOrUrl::File(path), Some(sha256)) => {
                        let message = "a file of the folder needs no hash";
                        self.problem(
                            self.place(&sha256),
                            message,
                            "remove it: the commit says what the file is",
                        );
                        ArchivePlace::File(path)
                    }
                    (FileOrUrl::Url(url), Some(sha256)) => ArchivePlace::Url { url, sha256: sha256.value.0 },
                    (FileOrUrl::Url(url), None) => {
                        let message = "what an address gives may change";
                        self.problem(at, message, "wanted `sha256` beside it, as sha256sum gives it");
                        ArchivePlace::File(url)
                    }
                };
                Source::Archive { place, archives: self.archives(archives) }
            }
            From::Image { place, archives } => {
                Source::Image { place: place.0, archives: self.archives(archives) }
            }
            From::Containerfile(raw) => self.containerfile(raw),
        }
    }

    fn containerfile(&mut self, raw: from::Containerfile) -> Source {
        let place = self.place(&raw.file);
        let mut secrets: Vec<_> = raw.secrets.into_iter().map(|name| name.0).collect();
        secrets.sort();
        secrets.dedup();
        let spec = ContainerfileSpec {
            file: raw.file.value.0,
            context: raw.context.map_or_else(|| ".".to_owned(), |folder| folder.0),
            target: raw.target.map(|stage| stage.0),
            args: raw.args.into_iter().map(|(name, value)| (name.0, value)).collect(),
            secrets,
        };
        if spec.file_in_context().is_none_or(|file| file == ".") {
            let message =
                format!("{} is no file of the folder {}", quoted(&spec.file), quoted(&spec.context));
            self.problem(
                place,
                message,
                "wanted a file of `context`, which is the folder of server.yaml where it is not said",
            );
        }
        Source::Containerfile(spec)
    }

    fn archives(&mut self, archives: At<Vec<from::Archive>>) -> Vec<ArchiveSpec> {
        self.at_most(MAX_ARCHIVES, "archives", &archives);
        if !archives.is_default() {
            self.not_empty(&archives, "the list of archives", "remove it to use the site's archives");
        }
        let archives = archives.value.into_iter().map(|archive| {
            self.not_empty(&archive.components, "the list of components", "wanted one such as [main]");
            ArchiveSpec {
                url: archive.url.0,
                suite: archive.suite.0,
                components: archive.components.value.into_iter().map(|name| name.0).collect(),
                signed_by: archive.signed_by.0,
            }
        });
        archives.collect()
    }

    fn steps(&mut self, steps: At<Vec<raw::Step>>, refuses: Option<NoPackages>) -> Vec<Step> {
        self.at_most(MAX_STEPS, "steps", &steps);
        let mut files_so_far = 0;
        let mut packages_so_far = 0;
        let mut checked = Vec::with_capacity(steps.value.len());
        for step in steps.value {
            let mut secrets: Vec<_> = step.secrets.value.into_iter().map(|name| name.0).collect();
            secrets.sort();
            secrets.dedup();
            let reach = Reach { network: step.network, secrets };
            checked.push(match step.does {
                raw::Does::Packages(packages) => {
                    self.not_empty(&packages, "the list of packages", "wanted names, or no such step");
                    if let Some(NoPackages { what, help }) = refuses {
                        let message = format!("packages can't be installed into {what}");
                        self.problem(self.place(&packages), message, help);
                    }
                    packages_so_far += packages.value.len();
                    if packages_so_far > MAX_PACKAGES {
                        let message = format!("{packages_so_far} packages are too many");
                        let help = format!("wanted at most {MAX_PACKAGES} in all steps");
                        self.problem(self.place(&packages), message, help);
                    }
                    Step::Packages(packages.value.into_iter().map(|name| name.0).collect())
                }
                raw::Does::Files(files) => {
                    self.not_empty(&files, "the list of files", "wanted files, or no such step");
                    files_so_far += files.value.len();
                    if files_so_far > MAX_FILES {
                        let message = format!("{files_so_far} files are too many");
                        let help =
                            format!("wanted at most {MAX_FILES} in all steps; a directory counts as one");
                        self.problem(self.place(&files), message, help);
                    }
                    Step::Files(files.value.into_iter().map(file).collect())
                }
                raw::Does::Run(script) => Step::Run(RunStep { script: script.0, reach }),
                raw::Does::Ansible(step) => {
                    let place = self.place(&step);
                    let raw::Ansible { playbook, vars, idempotent } = step.value;
                    let vars = vars.into_iter().map(|(name, value)| (name.0, value)).collect();
                    let by = Provisioner::Ansible { vars };
                    self.provision(by, playbook, idempotent, reach, refuses.map(|why| (place, why)))
                }
                raw::Does::Puppet(step) => {
                    let place = self.place(&step);
                    let raw::Puppet { manifest, idempotent } = step.value;
                    let refused = refuses.map(|why| (place, why));
                    self.provision(Provisioner::Puppet, manifest, idempotent, reach, refused)
                }
            });
        }
        checked
    }

    /// `refused` is the place of the step, where it can't be run.
    fn provision(
        &mut self,
        by: Provisioner,
        file: At<Text<InnerPath>>,
        idempotent: bool,
        reach: Reach,
        refused: Option<(Place, NoPackages)>,
    ) -> Step {
        if let Some((place, NoPackages { what, help })) = refused {
            let message = format!("{} can't be run in {what}", by.as_str());
            self.problem(place, message, help);
        }
        if file.value.0 == "." {
            self.problem(
                self.place(&file),
                "this is a folder",
                "wanted a file in it, such as playbook.yml or site.pp",
            );
        }
        Step::Provision(ProvisionSpec { by, file: file.value.0, idempotent, reach })
    }

    fn run(&mut self, raw: raw::Run) -> RunSpec {
        let mut capabilities: Vec<_> = raw.capabilities.into_iter().map(|capability| capability.0).collect();
        capabilities.sort();
        capabilities.dedup();
        if let Some(health) = &raw.health {
            self.verdict_before_deadline(health, &raw.rollout);
        }
        RunSpec {
            node: raw.node.map(|node| node.0),
            replicas: raw.replicas.0,
            ports: self.ports(raw.ports),
            writable: self.writable(raw.writable),
            env: env(raw.env),
            limits: Limits {
                memory_bytes: raw.limits.memory.map(|memory| memory.0),
                cpu_millis: raw.limits.cpus.map(|cpus| cpus.0),
                pids: Some(raw.limits.pids.0),
            },
            capabilities,
            health: raw.health.and_then(|health| self.health(health)),
            rollout: self.rollout(raw.rollout),
            drain: raw.drain.0,
        }
    }

    fn ports(&mut self, ports: At<Vec<raw::PortPair>>) -> Vec<Port> {
        self.at_most(MAX_PORTS, "ports", &ports);
        let mut checked: Vec<Port> = Vec::with_capacity(ports.value.len());
        for pair in ports.value {
            let port = Port { listen: pair.listen.value.number(), target: pair.target.number() };
            if checked.iter().any(|other| other.listen == port.listen) {
                let message = format!("the port {} is listened on twice", port.listen);
                self.problem(self.place(&pair.listen), message, "wanted each `listen` once");
            }
            checked.push(port);
        }
        checked
    }

    fn writable(&mut self, paths: At<Vec<At<Text<AbsolutePath>>>>) -> Vec<String> {
        self.at_most(MAX_WRITABLE, "writable directories", &paths);
        let inside = |path: &str, other: &str| {
            path.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let mut checked: Vec<String> = Vec::with_capacity(paths.value.len());
        for at in paths.value {
            let place = self.place(&at);
            let path = at.value.0;
            let kernel = KERNEL_TREES.iter().any(|tree| inside(&path, tree)) && path != "/dev/shm";
            if path == "/" || kernel {
                let message = format!("{} can't be made writable", quoted(&path));
                self.problem(place, message, "wanted directories such as /run or /var/log/nginx");
            } else if let Some(other) =
                checked.iter().find(|other| inside(&path, other) || inside(other, &path))
            {
                let message = format!("{} and {} overlap", quoted(&path), quoted(other));
                self.problem(place, message, "wanted the outer one alone");
            }
            checked.push(path);
        }
        checked
    }

    fn health(&mut self, at: At<raw::Health>) -> Option<HealthPolicy> {
        let place = self.place(&at);
        let raw = at.value;
        let mut checks = Vec::new();
        checks.extend(raw.http.map(|check| (check.place(self.places, place), http(check.value))));
        checks.extend(raw.tcp.map(|check| (check.place(self.places, place), tcp(check.value))));
        checks.extend(raw.command.map(|check| (check.place(self.places, place), command(check.value))));
        if let Some((second, _)) = checks.get(1) {
            self.problem(
                *second,
                "health is asked by one check, found two",
                "wanted one of http, tcp and command",
            );
        }
        let (interval, timeout) = (raw.interval.value.0, raw.timeout.value.0);
        if timeout > interval {
            let given = if raw.timeout.is_default() {
                &raw.interval.place(self.places, place)
            } else {
                &raw.timeout.place(self.places, place)
            };
            let (timeout, interval) = (time_text(timeout), time_text(interval));
            let message = format!("the timeout of {timeout} is longer than the interval of {interval}");
            self.problem(*given, message, "wanted timeout ≤ interval, so that checks do not pile up");
        }
        let Some((_, check)) = checks.into_iter().next() else {
            self.problem(place, "it is not said how health is asked", "wanted one of http, tcp and command");
            return None;
        };
        Some(HealthPolicy {
            check,
            interval,
            timeout,
            healthy: raw.healthy.0,
            unhealthy: raw.unhealthy.0,
            start: raw.start.value.0,
        })
    }

    /// An instance may be as slow as its policy lets it, and its rollout must still be able to succeed.
    fn verdict_before_deadline(&mut self, at: &At<raw::Health>, rollout: &raw::Rollout) {
        let health = &at.value;
        let (start, deadline) = (health.start.value.0, rollout.deadline.value.0);
        let checks = Millis(health.interval.value.0.0.saturating_mul(u64::from(health.unhealthy.0)));
        if start.0.saturating_add(checks.0) < deadline.0 {
            return;
        }
        let place = rollout.deadline.place(self.places, self.place(at));
        let place = health.start.place(self.places, place);
        let message = format!(
            "an instance may take {} to start and {} to be found unhealthy, but its rollout is rolled back after {}",
            time_text(start),
            time_text(checks),
            time_text(deadline)
        );
        self.problem(place, message, "wanted start + unhealthy × interval < deadline");
    }

    fn rollout(&mut self, raw: raw::Rollout) -> RolloutPolicy {
        let (soak, deadline) = (raw.soak.value.0, raw.deadline.value.0);
        if soak >= deadline {
            let place = raw.deadline.place(self.places, self.place(&raw.soak));
            let message = format!(
                "the deadline of {} is not after the soak of {}, so every rollout would be rolled back",
                time_text(deadline),
                time_text(soak)
            );
            self.problem(place, message, "wanted deadline > soak");
        }
        let place = self.place(&raw.rolling);
        let (max_surge, max_unavailable) =
            (raw.rolling.value.max_surge.0, raw.rolling.value.max_unavailable.0);
        if max_surge == 0 && max_unavailable == 0 {
            let message = "maxSurge and maxUnavailable are both 0, so no instance could ever be replaced";
            self.problem(place, message, "wanted one of the two to be at least 1");
        }
        RolloutPolicy { strategy: Strategy::Rolling { max_surge, max_unavailable }, soak, deadline }
    }
}

fn env(raw: raw::Env) -> BTreeMap<String, String> {
    raw.into_iter().map(|(name, value)| (name.0, value)).collect()
}

fn file(raw: raw::File) -> FileSpec {
    FileSpec {
        src: raw.src.0,
        dest: raw.dest.0,
        // Its syntax is that of an octal number.
        mode: raw.mode.and_then(|mode| u32::from_str_radix(&mode.0, 8).ok()),
        owner: raw.owner.0,
        template: raw.template,
    }
}
