//! The system calls that an instance may use: what servers need. Left out is what mounts, loads, traces, changes clocks or
//! namespaces, or is a young and large door into the kernel (`io_uring`, `bpf`, `userfaultfd`, `perf_event_open`).

use serde_json::{Value, json};

/// Allowed with any arguments.
const ALLOWED: &str = "
accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2
dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve
execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod fchmodat
fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat
get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups
getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid
getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr
inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents
io_pgetevents io_setup io_submit ioctl ioprio_get ioprio_set kill landlock_add_rule
landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr
llistxattr lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create
memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr
mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd
msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause
pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64
preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64 pwritev pwritev2 read readahead readlink
readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2
restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl
semget semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area
set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid
setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat shmctl shmdt shmget shutdown
sigaltstack signalfd signalfd4 socketpair splice stat statfs statx symlink symlinkat sync
sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask
uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
";

/// Allowed with a capability that would be useless without them.
const WITH_CAPABILITY: [(&str, &[&str]); 2] = [
    ("SYS_CHROOT", &["chroot"]),
    ("SYS_NICE", &["mbind", "get_mempolicy", "set_mempolicy", "migrate_pages", "move_pages"]),
];

/// CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET: no namespaces of one's own.
const NEW_NAMESPACES: u64 = 0x7E02_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// Sockets to the hypervisor, which knows nothing of our network.
const AF_VSOCK: u32 = 40;
/// PER_LINUX, PER_LINUX32, UNAME26 with each, and "tell me".
const PERSONALITIES: [u32; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

/// The profile in the form of the OCI runtime specification.
pub(super) fn profile(capabilities: &[String]) -> Value {
    // Programs of other architectures of the same machine are not filtered by this list, so they are not allowed.
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "SCMP_ARCH_AARCH64",
        _ => "SCMP_ARCH_X86_64",
    };
    let mut names: Vec<&str> = ALLOWED.split_whitespace().collect();
    for (capability, calls) in WITH_CAPABILITY {
        if capabilities.iter().any(|declared| declared == capability) {
            names.extend(calls);
        }
    }
    let argument = |value: u64, mask: Option<u64>, op: &str| {
        // For a masked comparison `value` is the mask and `valueTwo` what must be left.
        json!([{ "index": 0, "value": mask.unwrap_or(value), "valueTwo": if mask.is_some() { value } else { 0 }, "op": op }])
    };
    let allow = "SCMP_ACT_ALLOW";
    let mut rules = vec![
        json!({ "names": names, "action": allow }),
        json!({ "names": ["clone"], "action": allow,
            "args": argument(0, Some(NEW_NAMESPACES), "SCMP_CMP_MASKED_EQ") }),
        // Its flags lie in memory, out of a filter's sight: libc falls back to clone.
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }),
        json!({ "names": ["socket"], "action": allow, "args": argument(AF_VSOCK.into(), None, "SCMP_CMP_NE") }),
    ];
    rules.extend(PERSONALITIES.map(|personality| {
        json!({ "names": ["personality"], "action": allow, "args": argument(personality.into(), None, "SCMP_CMP_EQ") })
    }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": [architecture],
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_dangerous_call_is_allowed() {
        let allowed: Vec<&str> = ALLOWED.split_whitespace().collect();
        for call in [
            "mount",
            "umount2",
            "move_mount",
            "fsopen",
            "open_tree",
            "pivot_root",
            "chroot",
            "unshare",
            "setns",
            "bpf",
            "keyctl",
            "add_key",
            "request_key",
            "init_module",
            "finit_module",
            "delete_module",
            "kexec_load",
            "reboot",
            "ptrace",
            "process_vm_writev",
            "perf_event_open",
            "userfaultfd",
            "io_uring_setup",
            "open_by_handle_at",
            "clone",
            "clone3",
            "settimeofday",
            "clock_settime",
            "swapon",
            "iopl",
            "ioperm",
            "quotactl",
            "syslog",
        ] {
            assert!(!allowed.contains(&call), "{call}");
        }
        let mut unique = allowed.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), allowed.len());
    }
}
