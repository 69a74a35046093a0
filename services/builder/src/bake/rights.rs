//! The capabilities of root that a bake uses. Without some of them nothing fails: tar and dpkg leave out what they may not
//! set, and an image lacks it.

use rustix::thread::{CapabilitySet, capabilities};

use super::error::BakeError;

const USED: [(CapabilitySet, &str); 10] = [
    (CapabilitySet::CHOWN, "CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "DAC_OVERRIDE"),
    (CapabilitySet::FOWNER, "FOWNER"),
    (CapabilitySet::FSETID, "FSETID"),
    (CapabilitySet::SETUID, "SETUID"),
    (CapabilitySet::SETGID, "SETGID"),
    (CapabilitySet::SETFCAP, "SETFCAP"),
    (CapabilitySet::SYS_CHROOT, "SYS_CHROOT"),
    (CapabilitySet::SYS_ADMIN, "SYS_ADMIN"),
    (CapabilitySet::SYS_PTRACE, "SYS_PTRACE"),
];

/// # Errors
/// What this process lacks, and what to do about it.
pub(crate) fn check() -> Result<(), BakeError> {
    let held = capabilities(None).map_err(|errno| BakeError::Machine {
        what: "the builder's rights".to_owned(),
        why: errno.to_string(),
        remedy: "capget(2) has to be allowed to it".to_owned(),
    })?;
    let missing = missing(held.effective);
    if missing.is_empty() {
        return Ok(());
    }
    Err(BakeError::Machine {
        what: "the builder's rights".to_owned(),
        why: format!("it lacks {}", missing.join(", ")),
        remedy:
            "it has to run as root; in a container they are added by `cap_add`, in a unit they are part of \
                 `CapabilityBoundingSet`"
                .to_owned(),
    })
}

fn missing(held: CapabilitySet) -> Vec<&'static str> {
    USED.iter().filter(|(right, _)| !held.contains(*right)).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(CapabilitySet::all()), [""; 0]);
        let held = CapabilitySet::all() - CapabilitySet::SETFCAP - CapabilitySet::FSETID;
        assert_eq!(missing(held), ["FSETID", "SETFCAP"]);
        assert_eq!(missing(CapabilitySet::empty()).len(), USED.len());
    }
}
