//! What later steps will read, made ready while an earlier one leaves a processor idle: scripts of packages run one after
//! the other, and take longer than all unpacking.

use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_model::lock::LockedPackage;
use tokio_util::sync::CancellationToken;

use super::deb::Deb;
use super::error::BakeError;
use super::packages::PackageStore;

/// Yields to the steps' own unpacking and packing. Not to their scripts, which are in a cgroup of their own: what is opened
/// here would otherwise be opened after them, by the same processors.
const NICENESS: i32 = 19;

/// The packages of each step to come, opened in the background.
pub(crate) struct Ahead<'a> {
    pub(crate) store: &'a PackageStore,
    /// In the order of the steps.
    pub(crate) steps: Vec<&'a [LockedPackage]>,
    /// The step under way; what it and those before it read is not made ready any more.
    pub(crate) step: &'a AtomicUsize,
    pub(crate) cancel: &'a CancellationToken,
}

impl Ahead<'_> {
    /// Lowers the thread's priority, so it has to be one of its own.
    pub(crate) fn run(&self) {
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%error, "packages are not opened ahead");
            return;
        }
        for (at, packages) in self.steps.iter().enumerate() {
            let is_wanted = || at > self.step.load(Ordering::Relaxed) && !self.cancel.is_cancelled();
            for package in packages.iter().take_while(|_| is_wanted()) {
                // The step that needs it meets the same error, and tells it.
                if let Err(error) = self.open(package, &is_wanted) {
                    tracing::debug!(package = package.name, %error, "not opened ahead");
                }
            }
        }
    }

    fn open(&self, package: &LockedPackage, is_wanted: &dyn Fn() -> bool) -> Result<(), BakeError> {
        if self.store.opened_path(&package.sha256).exists() {
            return Ok(());
        }
        Deb::open(self.store, package)?.keep(is_wanted)
    }
}

#[cfg(test)]
mod tests {
    use tar::EntryType;

    use super::super::hostile::{deb, entry, put};
    use super::*;

    #[test]
    fn what_later_steps_need_is_opened_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = PackageStore::open(&folder.path().join("packages")).unwrap();
        let package = |name: &str| put(&store, &deb(&[entry(name, EntryType::Regular, "", b"content")]));
        let steps = [[package("./a")], [package("./b")], [package("./c")]];
        // One that is no package keeps nothing from the ones after it.
        let broken = [put(&store, b"no package"), package("./d")];
        let all: Vec<&[LockedPackage]> = vec![&steps[0], &steps[1], &steps[2], &broken];
        let opened = |package: &LockedPackage| store.opened_path(&package.sha256).exists();
        // Niceness can't be taken back, so it is a thread of its own.
        let ahead = |step: usize, cancel: &CancellationToken| {
            let step = AtomicUsize::new(step);
            let ahead = Ahead { store: &store, steps: all.clone(), step: &step, cancel };
            std::thread::scope(|scope| scope.spawn(|| ahead.run()).join().unwrap());
        };
        let cancelled = CancellationToken::new();
        cancelled.cancel();
        ahead(0, &cancelled);
        ahead(usize::MAX, &CancellationToken::new());
        assert!(!all.concat().iter().any(opened));
        ahead(1, &CancellationToken::new());
        assert_eq!(all.concat().iter().map(opened).collect::<Vec<_>>(), [false, false, true, false, true]);
    }
}
