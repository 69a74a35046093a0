//! Firewalls that drop forwarded packets, as Docker's does. An accept in our own table does not help against a drop in
//! another, so the rule goes where the drop is.

use std::time::Duration;

use crate::failure::Failure;
use crate::helper::Helpers;
use crate::names::Names;

const LIMIT: Duration = Duration::from_secs(10);

/// Chains that an accept can be put into, the more fitting one first.
const CHAINS: [&str; 2] = ["DOCKER-USER", "FORWARD"];

/// What the machine does with packets that are neither from nor to itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Forwarding {
    Free,
    /// Accepts are needed in this chain.
    Dropped {
        chain: &'static str,
    },
}

async fn iptables(helpers: &Helpers, args: &[&str]) -> Result<Vec<u8>, Failure> {
    let mut command = helpers.command("iptables")?;
    command.arg("-w").arg("5").args(args);
    helpers.run(command, b"", LIMIT).await
}

pub(crate) async fn forwarding(helpers: &Helpers) -> Forwarding {
    for chain in CHAINS {
        // Fails where there is no iptables, or no such chain: then nothing of it drops.
        let Ok(rules) = iptables(helpers, &["-S", chain]).await else { continue };
        let rules = String::from_utf8_lossy(&rules);
        if chain == "DOCKER-USER" || rules.lines().any(|line| line == "-P FORWARD DROP") {
            return Forwarding::Dropped { chain };
        }
    }
    Forwarding::Free
}

fn rules(names: &Names) -> [Vec<String>; 2] {
    ["-i", "-o"].map(|direction| {
        let words =
            [direction, names.bridge(), "-m", "comment", "--comment", &names.cgroup(), "-j", "ACCEPT"];
        words.map(str::to_owned).to_vec()
    })
}

/// Lets packets to and from the bridge pass where something else would drop them. Our own table decides which.
pub(crate) async fn ensure(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    let Forwarding::Dropped { chain } = forwarding(helpers).await else { return Ok(()) };
    for rule in rules(names) {
        let words: Vec<&str> = rule.iter().map(String::as_str).collect();
        if iptables(helpers, &[&["-C", chain], words.as_slice()].concat()).await.is_err() {
            iptables(helpers, &[&["-I", chain], words.as_slice()].concat()).await?;
        }
    }
    Ok(())
}

pub(crate) async fn remove(names: &Names, helpers: &Helpers) {
    for chain in CHAINS {
        for rule in rules(names) {
            let words: Vec<&str> = rule.iter().map(String::as_str).collect();
            let delete = [&["-D", chain], words.as_slice()].concat();
            // Ends with the first failure: no such rule, chain or program.
            while iptables(helpers, &delete).await.is_ok() {}
        }
    }
}

/// Our rules that are still there, as iptables prints them.
pub(crate) async fn left(names: &Names, helpers: &Helpers) -> Vec<String> {
    let mut found = Vec::new();
    for chain in CHAINS {
        if let Ok(rules) = iptables(helpers, &["-S", chain]).await {
            let rules = String::from_utf8_lossy(&rules);
            found.extend(rules.lines().filter(|rule| rule.contains(&names.cgroup())).map(str::to_owned));
        }
    }
    found
}
