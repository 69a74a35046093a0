//! Whether a machine can run programs for another processor: by an emulator that its kernel knows (`binfmt_misc`).

use std::fs;
use std::path::Path;

use kiln_model::architecture::Architecture;

const HANDLERS: &str = "/proc/sys/fs/binfmt_misc";

/// Where in an ELF file the processor stands, in two bytes.
const MACHINE_AT: usize = 18;

/// What to do where an emulator is missing, for [`can_run`].
pub const REMEDY: &str = "install one that the kernel opens once, for all containers, as Debian's qemu-user-static with binfmt-support \
                          does; or use a machine of that architecture";

/// `Ok` where programs of `architecture` run here.
///
/// # Errors
/// Why not, in words.
pub fn can_run(architecture: Architecture) -> Result<(), String> {
    if Architecture::of_machine() == Some(architecture) {
        return Ok(());
    }
    can_emulate(architecture, Path::new(HANDLERS))
}

fn can_emulate(architecture: Architecture, handlers: &Path) -> Result<(), String> {
    let own = std::env::consts::ARCH;
    let missing = || {
        format!("this machine's own processor is {own}, and its kernel knows no emulator for {architecture}")
    };
    let listed =
        fs::read_dir(handlers).map_err(|error| format!("{}: {}: {error}", missing(), handlers.display()))?;
    let mut outside = None;
    for path in listed.filter_map(Result::ok).map(|item| item.path()) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        match Handler::read(&text) {
            Some(handler) if handler.machine != elf_machine(architecture) => {}
            Some(Handler { is_opened_once: true, .. }) => return Ok(()),
            Some(_) => outside = Some(path),
            None => {}
        }
    }
    Err(match outside {
        Some(path) => format!(
            "the emulator of {} is looked for inside of each image, where it is not: it has to be registered with the flag F",
            path.display()
        ),
        None => missing(),
    })
}

/// `e_machine`: EM_X86_64 and EM_AARCH64 of elf(5), in the byte order of both.
fn elf_machine(architecture: Architecture) -> [u8; 2] {
    match architecture {
        Architecture::Amd64 => 62u16.to_le_bytes(),
        Architecture::Arm64 => 183u16.to_le_bytes(),
    }
}

/// An interpreter that is enabled, of ELF files.
struct Handler {
    machine: [u8; 2],
    /// The kernel opened it when it was registered; else it is looked for by its path in the root of who runs a program.
    is_opened_once: bool,
}

impl Handler {
    /// As the kernel shows it: `enabled`, then `flags: POCF`, `offset 0` and `magic 7f454c46…`, each in a line.
    fn read(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next() != Some("enabled") {
            return None;
        }
        let (mut flags, mut offset, mut magic) = ("", "", "");
        for line in lines {
            match line.split_once(' ') {
                Some(("flags:", rest)) => flags = rest,
                Some(("offset", rest)) => offset = rest,
                Some(("magic", rest)) => magic = rest,
                _ => {}
            }
        }
        let byte = |at: usize| u8::from_str_radix(magic.get(2 * at..2 * at + 2)?, 16).ok();
        let machine = [byte(MACHINE_AT)?, byte(MACHINE_AT + 1)?];
        (offset == "0" && magic.starts_with("7f454c46"))
            .then(|| Self { machine, is_opened_once: flags.contains('F') })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &str = "7f454c460201010000000000000000000200b700";

    fn other() -> Architecture {
        match Architecture::of_machine() {
            Some(Architecture::Arm64) => Architecture::Amd64,
            _ => Architecture::Arm64,
        }
    }

    fn handler(state: &str, flags: &str, machine: [u8; 2]) -> String {
        let magic = MAGIC.replace("b700", &format!("{:02x}{:02x}", machine[0], machine[1]));
        format!("{state}\ninterpreter /usr/libexec/qemu\nflags: {flags}\noffset 0\nmagic {magic}\nmask ff\n")
    }

    #[test]
    fn an_emulator_counts_where_it_is_enabled_for_this_processor_and_opened_once() {
        let folder = tempfile::tempdir().unwrap();
        let (wanted, machine) = (other(), elf_machine(other()));
        let said = |text: &str| {
            fs::write(folder.path().join("status"), "enabled\n").unwrap();
            fs::write(folder.path().join("qemu"), text).unwrap();
            can_emulate(wanted, folder.path())
        };
        assert_eq!(said(&handler("enabled", "POCF", machine)), Ok(()));
        assert_eq!(said(&handler("enabled", "F", machine)), Ok(()));
        for text in [
            handler("disabled", "F", machine),
            handler("enabled", "F", [40, 0]),
            handler("enabled", "F", machine).replace("offset 0", "offset 1"),
            handler("enabled", "F", machine).replace("7f454c46", "7f454c47"),
            "enabled\ninterpreter /x\nflags: F\nextension .py\n".to_owned(),
            "enabled\nflags: F\noffset 0\nmagic 7f454c46\u{e9}\n".to_owned(),
            String::new(),
        ] {
            let why = said(&text).unwrap_err();
            assert!(why.contains(&format!("no emulator for {wanted}")), "{text}: {why}");
        }
        let why = said(&handler("enabled", "POC", machine)).unwrap_err();
        assert!(why.contains("the flag F"), "{why}");
        let nowhere = can_emulate(wanted, Path::new("/nonexistent")).unwrap_err();
        assert!(nowhere.contains("/nonexistent"), "{nowhere}");
    }
}
