//! Images for another processor than the machine's own: by Debian's emulator, which the kernel knows while the test runs.

use kiln_model::architecture::Architecture;
use kiln_service::emulation;

use super::*;

const HANDLERS: &str = "/proc/sys/fs/binfmt_misc";

/// An emulator as the kernel knows it.
struct Emulator {
    /// None where the machine had one already.
    registered: Option<PathBuf>,
}

impl Emulator {
    /// Of arm64: ELF files of 64 bits, low bytes first, of machine 183, that are programs or libraries.
    fn register(name: &str) -> Self {
        if emulation::can_run(Architecture::Arm64).is_ok() {
            return Self { registered: None };
        }
        let handlers = Path::new(HANDLERS);
        if !handlers.join("register").exists() {
            succeeds(Command::new("mount").args(["-t", "binfmt_misc", "none", HANDLERS]));
        }
        let magic = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00";
        let mask = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff";
        let line = format!(":{name}:M::{magic}:{mask}:/usr/bin/qemu-aarch64-static:OCF");
        fs::write(handlers.join("register"), line).unwrap();
        Self { registered: Some(handlers.join(name)) }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if let Some(path) = &self.registered {
            let _ = fs::write(path, "-1");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_for_another_processor_is_made_where_the_kernel_has_an_emulator_for_it() {
    assert_eq!(Architecture::of_machine(), Some(Architecture::Amd64), "this test emulates arm64");
    let kitchen = Kitchen::new("be000014", BakeLimits::default());
    let definition = "  architecture: arm64\n  from: { debian: bookworm, variant: essential }\n  steps: [{ run: uname -m > /processor }]";
    if emulation::can_run(Architecture::Arm64).is_err() {
        let refused = kitchen.try_lock(definition, None, None).await.unwrap_err().to_string();
        for word in ["architecture arm64", "no emulator for arm64", "qemu-user-static"] {
            assert!(refused.contains(word), "{refused}");
        }
    }
    let _emulator = Emulator::register("kiln-be000014");
    let lock = kitchen.lock(definition, None, None).await.lock;
    assert_eq!(lock.architecture, "arm64");
    let image = kitchen.bake(&lock, 1).await;
    assert_eq!(kitchen.read(&image, "processor").unwrap(), "aarch64\n");
    let config = kitchen.store().image(&image.digest).unwrap().config;
    assert_eq!(config.architecture().to_string(), "arm64");

    // Packages are kept for the processor that they are for.
    let pinned = kitchen.lock(definition, None, Some(&lock)).await;
    assert_eq!((pinned.lock == lock, pinned.release_files), (true, None));
    let own = kitchen.lock(&definition.replace("arm64", "amd64"), None, Some(&lock)).await;
    assert!(own.lock.architecture == "amd64" && own.release_files.is_some(), "{:?}", own.lock);

    // What is on top of it is for the same.
    let parent = ParentImage { digest: image.digest, debian: None };
    let child = "  from: { server: base }\n  steps: [{ run: uname -m > /child }]";
    let lock = kitchen.lock(child, Some(parent), None).await.lock;
    assert_eq!(lock.architecture, "arm64");
    let image = kitchen.bake(&lock, 2).await;
    assert_eq!(kitchen.read(&image, "child").unwrap(), "aarch64\n");
    kitchen.assert_nothing_is_left();
}
