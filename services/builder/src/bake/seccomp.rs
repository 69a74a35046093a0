//! System calls that nothing in a build step needs, and that have a history of holes in the kernel behind them.

use serde_json::{Value, json};

use super::sandbox::Rights;

/// The rest is allowed: a list of what is allowed breaks each time a newer libc tries a newer call first, and what is not in
/// this list is bounded by the missing capabilities.
const REFUSED: &[&str] = &[
    "acct",
    "add_key",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "create_module",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "get_kernel_syms",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mbind",
    "migrate_pages",
    "move_pages",
    "name_to_handle_at",
    "nfsservctl",
    "open_by_handle_at",
    "perf_event_open",
    "pidfd_getfd",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "set_mempolicy",
    "setns",
    "settimeofday",
    "swapoff",
    "swapon",
    "syslog",
    "userfaultfd",
    "uselib",
    "vhangup",
];
/// What makes containers; refused where no container is made.
const OF_CONTAINERS: &[&str] = &[
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "pivot_root",
    "setdomainname",
    "sethostname",
    "umount",
    "umount2",
    "unshare",
];
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NAMESPACES: [u64; 7] =
    [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];

pub(crate) fn profile(rights: Rights) -> Value {
    const NOT_PERMITTED: u32 = 1;
    const NOT_IMPLEMENTED: u32 = 38;
    let mut rules = vec![
        json!({"names": REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": NOT_PERMITTED}),
        // Its flags lie in memory, where a filter can't look; libc then takes clone(2), whose flags it can see.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": NOT_IMPLEMENTED}),
    ];
    if rights == Rights::Step {
        rules.push(json!({"names": OF_CONTAINERS, "action": "SCMP_ACT_ERRNO", "errnoRet": NOT_PERMITTED}));
        // One rule a flag, as each of them alone is enough.
        rules.extend(NAMESPACES.iter().map(|flag| {
            let argument = json!({"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"});
            json!({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": NOT_PERMITTED, "args": [argument]})
        }));
    }
    // Calls by the processor's other ABIs would go past the list: without their architectures here they are refused.
    let architecture = if cfg!(target_arch = "aarch64") { "SCMP_ARCH_AARCH64" } else { "SCMP_ARCH_X86_64" };
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": [architecture], "syscalls": rules})
}
