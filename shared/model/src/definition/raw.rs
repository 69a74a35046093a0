//! A definition as it is written. The JSON Schema for editors is made from these types: what is said of a field here
//! is what a user reads.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::Mode;
use super::from::From;
use super::number::{Cpus, Memory, Port, Time, Whole};
use super::read::At;
use super::text::{
    AbsolutePath, Address, Capability, EnvName, FileMode, InnerPath, Machine, Name, Owner, PackageName,
    PackageVersion, ProgramName, Script, SecretName, Text, UrlPath, User, UserName, VariableName, Wanted,
};
use crate::architecture::Architecture;
use crate::time::Millis;

const SECOND: u64 = 1000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;

pub(super) type Env = BTreeMap<Text<EnvName>, String>;

/// A server that Kiln bakes into an image, runs, watches and replaces.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least name and image")]
pub(super) struct Definition {
    /// The version of this format.
    #[serde(default)]
    #[allow(dead_code, reason = "there is one version, so that reading it is checking it")]
    pub(super) api_version: ApiVersion,
    /// The server's name: a DNS label of at most 40 characters.
    pub(super) name: Text<Name>,
    /// What the instances are made from. A change here bakes a new image.
    pub(super) image: Image,
    /// How the instances run. A change here alone replaces them without baking.
    #[serde(default)]
    pub(super) run: Run,
    /// Which causes act by themselves.
    #[serde(default)]
    pub(super) update: Update,
}

#[derive(Default, Deserialize, Serialize, JsonSchema)]
pub(super) enum ApiVersion {
    #[default]
    #[serde(rename = "kiln/v1")]
    V1,
}

/// What the instances are made from.
#[derive(Deserialize, JsonSchema)]
#[serde(
    rename_all = "camelCase",
    deny_unknown_fields,
    expecting = "a mapping with at least from and command"
)]
pub(super) struct Image {
    /// What the image begins with.
    pub(super) from: From,
    /// What processors it is for; the builder's own where it is not said, or the parent server's. For another one than its own
    /// the builder needs an emulator.
    pub(super) architecture: Option<Architecture>,
    /// What is done to it, in this order; at most 64.
    #[serde(default)]
    pub(super) steps: At<Vec<Step>>,
    /// Environment of the build's `run` steps, and of the command.
    #[serde(default)]
    pub(super) env: Env,
    /// Who the command runs as: a name or number, with a group after a colon if it is not the user's own.
    #[serde(default = "root")]
    pub(super) user: Text<User>,
    /// The program and its arguments; no shell is involved.
    #[schemars(length(min = 1))]
    pub(super) command: At<Vec<At<String>>>,
    /// What must hold of a throwaway instance before the image is ready.
    #[serde(default)]
    pub(super) tests: At<Vec<At<Check>>>,
}

fn root() -> Text<User> {
    Text("root".to_owned())
}

/// One thing that is done to the image.
pub(super) struct Step {
    pub(super) does: Does,
    pub(super) network: bool,
    pub(super) secrets: At<Vec<Text<SecretName>>>,
}

pub(super) enum Does {
    Packages(At<Vec<Text<PackageName>>>),
    Files(At<Vec<File>>),
    Run(Text<Script>),
    Ansible(At<Ansible>),
    Puppet(At<Puppet>),
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StepKeys {
    /// Installs Debian packages and what they depend on.
    packages: Option<At<Vec<Text<PackageName>>>>,
    /// Puts files of the definition's folder into the image.
    files: Option<At<Vec<File>>>,
    /// Runs a script with /bin/sh.
    run: Option<Text<Script>>,
    /// Runs a playbook by ansible-playbook, which can install packages of the image's archives.
    ansible: Option<At<Ansible>>,
    /// Runs a manifest by puppet apply, which can install packages of the image's archives.
    puppet: Option<At<Puppet>>,
    /// For run, ansible and puppet: reaches the network that the builder's machine reaches, but not that machine's loopback.
    network: Option<At<bool>>,
    /// For run, ansible and puppet: names of secrets under `[secrets]` in site.toml. Each is a file of that name in /run/secrets,
    /// in memory and while the step runs; the step fails where it leaves one in the image.
    secrets: Option<At<Vec<Text<SecretName>>>>,
}

const DOES: &str = "packages, files, run, ansible or puppet";

impl StepKeys {
    /// The one thing that the step does, where nothing is said that goes with another.
    fn checked(self) -> Result<Step, String> {
        let said = [
            ("packages", self.packages.is_some()),
            ("files", self.files.is_some()),
            ("run", self.run.is_some()),
            ("ansible", self.ansible.is_some()),
            ("puppet", self.puppet.is_some()),
        ];
        let mut said = said.iter().filter(|(_, said)| *said).map(|(name, _)| *name);
        let (first, second) = (said.next(), said.next());
        if let (Some(first), Some(second)) = (first, second) {
            return Err(format!(
                "a step does one thing, found `{first}` and `{second}`\nmake two steps of it, in the order that is wanted"
            ));
        }
        if let Some(first @ ("packages" | "files")) = first {
            let more = [("network", self.network.is_some()), ("secrets", self.secrets.is_some())];
            if let Some((name, _)) = more.iter().find(|(_, said)| *said) {
                return Err(format!(
                    "`{name}` does not go with `{first}`\nit runs nothing that could use it"
                ));
            }
        }
        let (network, secrets) = (self.network.is_some_and(|it| it.value), self.secrets.unwrap_or_default());
        let does = match (self.packages, self.files, self.run, self.ansible, self.puppet) {
            (Some(packages), ..) => Does::Packages(packages),
            (_, Some(files), ..) => Does::Files(files),
            (_, _, Some(script), ..) => Does::Run(script),
            (_, _, _, Some(playbook), _) => Does::Ansible(playbook),
            (_, _, _, _, Some(manifest)) => Does::Puppet(manifest),
            _ => return Err(format!("it is not said what the step does\nwanted {DOES}")),
        };
        Ok(Step { does, network, secrets })
    }
}

impl<'de> Deserialize<'de> for Step {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = Step;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a step: {DOES}")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Step, A::Error> {
                StepKeys::deserialize(MapAccessDeserializer::new(map))?.checked().map_err(A::Error::custom)
            }
        }

        deserializer.deserialize_any(Form)
    }
}

impl JsonSchema for Step {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Step".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut keys = StepKeys::json_schema(generator);
        let reaches_nothing = serde_json::json!({
            "anyOf": [{ "required": ["network"] }, { "required": ["secrets"] }]
        });
        keys.insert(
            "oneOf".to_owned(),
            serde_json::json!([
                { "required": ["packages"], "not": reaches_nothing },
                { "required": ["files"], "not": reaches_nothing },
                { "required": ["run"] },
                { "required": ["ansible"] },
                { "required": ["puppet"] },
            ]),
        );
        keys.insert("description".to_owned(), "One thing that is done to the image.".into());
        keys
    }
}

/// A manifest. All that lies in its folder goes along: modules, and hiera.yaml with its data.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least manifest")]
pub(super) struct Puppet {
    /// Relative to the definition's folder.
    pub(super) manifest: At<Text<InnerPath>>,
    /// Runs it a second time, which must change nothing.
    #[serde(default)]
    pub(super) idempotent: bool,
}

/// A playbook. All that lies in its folder goes along: roles, collections, templates, variables.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least playbook")]
pub(super) struct Ansible {
    /// Relative to the definition's folder.
    pub(super) playbook: At<Text<InnerPath>>,
    /// Given as extra variables, which override all others.
    #[serde(default)]
    pub(super) vars: BTreeMap<Text<VariableName>, Value>,
    /// Runs it a second time, which must change nothing.
    #[serde(default)]
    pub(super) idempotent: bool,
}

/// A file, or a directory with what is in it.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with src and dest")]
pub(super) struct File {
    /// Relative to the definition's folder.
    pub(super) src: Text<InnerPath>,
    /// Absolute path in the image.
    pub(super) dest: Text<AbsolutePath>,
    /// Octal, in quotes: "0644". Without it 0755 for directories and what its owner can execute, else 0644.
    pub(super) mode: Option<Text<FileMode>>,
    /// User and group.
    #[serde(default = "root_root")]
    pub(super) owner: Text<Owner>,
    /// Puts the server's name in the place of {{ name }}, and a variable of the image's env in that of {{ env.NAME }}.
    #[serde(default)]
    pub(super) template: bool,
}

fn root_root() -> Text<Owner> {
    Text("root:root".to_owned())
}

/// One question to an instance.
#[derive(Deserialize, JsonSchema)]
#[serde(
    rename_all = "camelCase",
    expecting = "a check: http, tcp, command, file, package, user, port, process or log"
)]
pub(super) enum Check {
    Http(HttpCheck),
    Tcp(TcpCheck),
    Command(CommandCheck),
    File(FileCheck),
    Package(PackageCheck),
    User(UserCheck),
    Port(PortCheck),
    Process(ProcessCheck),
    Log(LogCheck),
}

/// A GET whose answer is looked at.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least port")]
pub(super) struct HttpCheck {
    pub(super) port: Port,
    #[serde(default = "slash")]
    pub(super) path: Text<UrlPath>,
    /// The status that is wanted; without it any from 200 to 399.
    pub(super) status: Option<Whole<100, 599>>,
    /// A text that the body contains.
    pub(super) body: Option<Text<Wanted>>,
}

fn slash() -> Text<UrlPath> {
    Text("/".to_owned())
}

/// A connection that is accepted.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with port")]
pub(super) struct TcpCheck {
    pub(super) port: Port,
}

/// A command given to /bin/sh inside the instance.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least run")]
pub(super) struct CommandCheck {
    pub(super) run: Text<Script>,
    /// The exit status that is wanted.
    #[serde(default = "success")]
    pub(super) status: Whole<0, 255>,
    /// A text that standard output contains.
    pub(super) stdout: Option<Text<Wanted>>,
}

fn success() -> Whole<0, 255> {
    Whole(0)
}

/// A file of the instance's root file system.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least path")]
pub(super) struct FileCheck {
    pub(super) path: Text<AbsolutePath>,
    /// Octal, in quotes: "0644".
    pub(super) mode: Option<Text<FileMode>>,
    /// A user's name or number.
    pub(super) owner: Option<Text<User>>,
    /// A text that the file contains.
    pub(super) contains: Option<Text<Wanted>>,
    /// The path must not exist.
    #[serde(default)]
    pub(super) absent: bool,
}

/// A Debian package that is installed.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least name")]
pub(super) struct PackageCheck {
    pub(super) name: Text<PackageName>,
    /// The version, or what it begins with up to the end of a number: 1.22 stands for 1.22.1-9, and not for 1.220.
    pub(super) version: Option<Text<PackageVersion>>,
    /// It must not be installed.
    #[serde(default)]
    pub(super) absent: bool,
}

/// A user of the instance's own database.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least name")]
pub(super) struct UserCheck {
    pub(super) name: Text<UserName>,
    pub(super) uid: Option<Whole<0, 65_535>>,
    /// A group that it belongs to, as its own or as one of its members.
    pub(super) group: Option<Text<UserName>>,
    pub(super) home: Option<Text<AbsolutePath>>,
    pub(super) shell: Option<Text<AbsolutePath>>,
    /// There must be no such user.
    #[serde(default)]
    pub(super) absent: bool,
}

/// A port that something in the instance listens on, also where nothing outside reaches it.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least port")]
pub(super) struct PortCheck {
    pub(super) port: Port,
    #[serde(default)]
    pub(super) protocol: Transport,
    /// The address that it is bound to, such as 127.0.0.1; without it any.
    pub(super) address: Option<Text<Address>>,
    /// Nothing must listen there.
    #[serde(default)]
    pub(super) absent: bool,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Transport {
    #[default]
    Tcp,
    Udp,
}

/// Processes of the instance, by the name of their program.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least name")]
pub(super) struct ProcessCheck {
    /// The program's name without its folder, such as nginx.
    pub(super) name: Text<ProgramName>,
    /// Who each of them runs as: a user's name or number.
    pub(super) user: Option<Text<User>>,
    /// How many there are; without it at least one.
    pub(super) count: Option<Whole<1, 1_000_000>>,
    /// There must be none.
    #[serde(default)]
    pub(super) absent: bool,
}

/// What the instance wrote to its log until this check is made.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with at least contains")]
pub(super) struct LogCheck {
    /// A text within one line.
    pub(super) contains: Text<Wanted>,
    /// No line must contain it.
    #[serde(default)]
    pub(super) absent: bool,
}

/// How the instances run.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Run {
    /// The machine that they run on, by its name in the site's `[nodes]`. Without it, the site's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<Text<Machine>>,
    /// How many instances there are.
    pub(super) replicas: Whole<1, 1000>,
    /// Ports that users connect to, and the ones that instances answer on.
    pub(super) ports: At<Vec<PortPair>>,
    /// Directories that are in memory, starting as a copy of the image's content; all else is read-only.
    pub(super) writable: At<Vec<At<Text<AbsolutePath>>>>,
    /// Added to the image's environment, or in its place.
    pub(super) env: Env,
    pub(super) limits: Limits,
    /// Linux capabilities to keep, without CAP_; all others are dropped.
    pub(super) capabilities: Vec<Text<Capability>>,
    /// When an instance is healthy. Without it, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) health: Option<At<Health>>,
    pub(super) rollout: Rollout,
    /// Time that open connections get to end after an instance left the edge.
    pub(super) drain: Time<0, HOUR>,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            node: None,
            replicas: Whole(1),
            ports: At::default(),
            writable: At::default(),
            env: Env::default(),
            limits: Limits::default(),
            capabilities: Vec::new(),
            health: None,
            rollout: Rollout::default(),
            drain: Time(Millis::from_secs(10)),
        }
    }
}

/// A port that users connect to, and the one that instances answer on.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with listen and target")]
pub(super) struct PortPair {
    /// On the machine.
    pub(super) listen: At<Port>,
    /// In the instance.
    pub(super) target: Port,
}

/// What one instance may use at most.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Limits {
    /// Such as 256Mi. Without it as much as the machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<Memory>,
    /// Such as 0.5. Without it as much as the machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpus: Option<Cpus>,
    /// Processes and threads.
    pub(super) pids: Whole<1, 4_194_304>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: None, cpus: None, pids: Whole(2048) }
    }
}

/// When an instance is healthy: one of http, tcp and command, and how often it is asked.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(
    default,
    rename_all = "camelCase",
    deny_unknown_fields,
    expecting = "a mapping with http, tcp or command"
)]
pub(super) struct Health {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) http: Option<At<HttpCheck>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tcp: Option<At<TcpCheck>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) command: Option<At<CommandCheck>>,
    /// Time between two checks.
    pub(super) interval: At<Time<50, HOUR>>,
    /// Time that one check may take; at most the interval.
    pub(super) timeout: At<Time<10, HOUR>>,
    /// Consecutive passes that make an instance healthy.
    pub(super) healthy: Whole<1, 100>,
    /// Consecutive failures that make it unhealthy. One that fails between passes, more than once in four answers and for
    /// long, is unhealthy too.
    pub(super) unhealthy: Whole<1, 100>,
    /// Failures within this time after the launch do not count.
    pub(super) start: At<Time<0, HOUR>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            http: None,
            tcp: None,
            command: None,
            interval: Time(Millis::from_secs(2)).into(),
            timeout: Time(Millis::from_secs(1)).into(),
            healthy: Whole(2),
            unhealthy: Whole(3),
            start: Time(Millis::from_secs(30)).into(),
        }
    }
}

/// How new instances take the place of old ones.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Rollout {
    pub(super) rolling: At<Rolling>,
    /// Time that new instances must be healthy before a step counts as done.
    pub(super) soak: At<Time<0, DAY>>,
    /// Time after which an unfinished rollout is rolled back.
    pub(super) deadline: At<Time<SECOND, DAY>>,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            rolling: At::default(),
            soak: Time(Millis::from_secs(10)).into(),
            deadline: Time(Millis::from_secs(300)).into(),
        }
    }
}

/// A few at a time. One of the two must be more than 0.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(
    default,
    rename_all = "camelCase",
    deny_unknown_fields,
    expecting = "a mapping with maxSurge and maxUnavailable"
)]
pub(super) struct Rolling {
    /// Instances above the number of replicas.
    pub(super) max_surge: Whole<0, 1000>,
    /// Instances below the number of replicas.
    pub(super) max_unavailable: Whole<0, 1000>,
}

impl Default for Rolling {
    fn default() -> Self {
        Self { max_surge: Whole(1), max_unavailable: Whole(0) }
    }
}

/// Which causes act by themselves.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Update {
    pub(super) on: On,
    /// Time in which further causes join the first one.
    pub(super) debounce: Time<0, DAY>,
}

impl Default for Update {
    fn default() -> Self {
        Self { on: On::default(), debounce: Time(Millis::from_secs(30)) }
    }
}

/// What is done for each cause: auto acts by itself, approve waits for a person, never does nothing.
#[derive(Default, Deserialize, Serialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping")]
pub(super) struct On {
    /// The definition changed in Git.
    pub(super) definition: Mode,
    /// Packages of the image have newer versions.
    pub(super) packages: Mode,
    /// An instance became unhealthy or is gone: it is replaced.
    pub(super) unhealthy: Mode,
}
