//! Which process of this machine listens on a port.

use std::fs;
use std::path::Path;

use crate::failure::{During, Failure};

/// The state of a listening socket in /proc/net/tcp.
const LISTEN: &str = "0A";

/// Who listens on the port, on whatever address: the edge would take its users away.
pub(crate) fn holder(port: u16) -> Result<Option<String>, Failure> {
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let sockets = match fs::read_to_string(table) {
            Ok(sockets) => sockets,
            // Without IPv6 there is no such table.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).during(|| format!("reading {table}")),
        };
        if let Some(inode) = listener(&sockets, port) {
            return Ok(Some(process_with(&inode).unwrap_or_else(|| "an unknown process".to_owned())));
        }
    }
    Ok(None)
}

/// The inode of the socket that listens on a port.
fn listener(sockets: &str, port: u16) -> Option<String> {
    let port = format!(":{port:04X}");
    sockets.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let listens = fields.get(1)?.ends_with(&port) && *fields.get(3)? == LISTEN;
        listens.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    })
}

fn process_with(inode: &str) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let holds = |process: &Path| {
        let fds = fs::read_dir(process.join("fd")).ok()?;
        fds.flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))
            .then_some(())
    };
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        holds(&entry.path())?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some(format!("process {pid} ({})", name.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_with_its_process() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let holder = super::holder(port).unwrap().unwrap();
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        drop(socket);
        assert_eq!(super::holder(port).unwrap(), None);
    }

    #[test]
    fn a_connection_is_not_a_listener() {
        let line =
            "  sl  local_address rem_address   st\n   0: 0100007F:1F90 0100007F:C350 01 0:0 0:0 0 0 0 4242\n";
        assert_eq!(listener(line, 8080), None);
        assert_eq!(listener(&line.replace(" 01 ", " 0A "), 8080), Some("4242".to_owned()));
    }
}
