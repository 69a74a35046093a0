//! Connections that an instance still has.

use std::fs;

use crate::failure::{During, Failure};

/// States of /proc/net/tcp in which a user waits for something: established, being opened, and closed with bytes that
/// are still on their way. FIN_WAIT2 and TIME_WAIT have nothing left to send.
const OPEN: [&str; 7] = ["01", "03", "04", "08", "09", "0B", "0C"];

/// How many connections to these ports are open in the network namespace of a process; none once it has ended.
pub(crate) fn open_connections(pid: u32, ports: &[u16]) -> Result<usize, Failure> {
    let mut open = 0;
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{pid}/net/{table}");
        match fs::read_to_string(&path) {
            Ok(sockets) => open += count(&sockets, ports),
            // The process has ended, or there is no IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EINVAL)) => {
            }
            Err(error) => return Err(error).during(|| format!("reading {path}")),
        }
    }
    Ok(open)
}

fn count(sockets: &str, ports: &[u16]) -> usize {
    let is_open = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let port = fields.next().and_then(|local| u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok());
        let state = fields.nth(1);
        port.is_some_and(|port| ports.contains(&port)) && state.is_some_and(|state| OPEN.contains(&state))
    };
    sockets.lines().skip(1).filter(is_open).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connections_to_the_instance_s_ports_count() {
        let line = |local: &str, state: &str| {
            format!("   0: 0A4D0005:{local} 0A4D0001:D2A8 {state} 0:0 00:0 0 0 0 1\n")
        };
        let sockets = [
            "  sl  local_address rem_address st\n".to_owned(),
            line("0050", "01"),
            line("0050", "0A"),
            line("0050", "06"),
            line("1F90", "01"),
            line("0050", "03"),
        ]
        .concat();
        assert_eq!(count(&sockets, &[80]), 2);
        assert_eq!(count(&sockets, &[80, 8080]), 3);
        assert_eq!(count(&sockets, &[]), 0);
    }

    #[test]
    fn a_connection_of_this_process_is_seen() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let pid = std::process::id();
        assert_eq!(open_connections(pid, &[address.port()]).unwrap(), 0);
        let _client = std::net::TcpStream::connect(address).unwrap();
        // In the accept queue: the user already waits.
        assert_eq!(open_connections(pid, &[address.port()]).unwrap(), 1);
        assert_eq!(open_connections(u32::MAX, &[address.port()]).unwrap(), 0);
    }
}
