//! How ansible-playbook is run.

use std::collections::BTreeMap;

use kiln_model::lock::Provision;
use serde_json::Value;

use super::error::BakeError;
use super::provision::{FILES, HOME, Program, TOLD, quoted, socat};
use super::tools::{self, Recipe};

/// Modules that install packages need python3-apt in the Python that they are run by.
pub(crate) const PACKAGES: [&str; 2] = ["ansible-core", "python3-apt"];
const PYTHON: &str = "kiln-python";
const RECIPE: Recipe<'static> = Recipe {
    programs: &[("usr/bin/python3", PYTHON), socat()],
    setting: "",
    // Read-only later, so that it would be compiled in each run. What can't be compiled is read as it is.
    prepare: "python3 -m compileall -q -j 0 /usr/lib/python3 /usr/lib/python3.* >/dev/null || :",
};

pub(crate) fn program(provision: &Provision, vars: &BTreeMap<String, Value>) -> Result<Program, BakeError> {
    let python = format!("{}/usr/bin/{PYTHON}", tools::INSIDE);
    let (host, file) = (quoted(&provision.host), quoted(&format!("{FILES}/{}", provision.file)));
    let vars = serde_json::to_string(vars).map_err(|e| BakeError::io("write", "the variables")(e.into()))?;
    Ok(Program {
        recipe: RECIPE,
        env: vec![
            ("ANSIBLE_HOME", HOME.to_owned()),
            ("ANSIBLE_LOCAL_TEMP", format!("{HOME}/local")),
            ("ANSIBLE_REMOTE_TMP", format!("{HOME}/remote")),
            ("ANSIBLE_LOG_PATH", format!("{HOME}/said")),
            ("ANSIBLE_NOCOLOR", "1".to_owned()),
            ("ANSIBLE_RETRY_FILES_ENABLED", "0".to_owned()),
            ("ANSIBLE_LOCALHOST_WARNING", "0".to_owned()),
            // Which every system has; sudo is a package of its own.
            ("ANSIBLE_BECOME_METHOD", "su".to_owned()),
            // As sudo does it: also as who can't log in.
            ("ANSIBLE_SU_FLAGS", "-s /bin/sh".to_owned()),
        ],
        told: vec![("vars.json", vars)],
        functions: format!(
            "play() {{\n\
             : >{HOME}/said\n\
             {python} -m ansible playbook --inventory {host}, --connection local \
             --extra-vars ansible_python_interpreter={python} --extra-vars @{TOLD}/vars.json {file}\n\
             }}\n\
             changed() {{ grep -Eq ' changed=[1-9]' {HOME}/said; }}"
        ),
        check: format!(
            "if ! grep -Eq ' ok=[0-9]+ +changed=' {HOME}/said; then\n\
             echo 'no play of the playbook is for this host: say `hosts: all`' >&2\n\
             exit 1\n\
             fi"
        ),
    })
}
