//! A connection that is accepted.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;

use crate::Verdict;

pub(crate) async fn connect(address: IpAddr, port: u16, timeout: Duration) -> Verdict {
    let place = SocketAddr::new(address, port);
    match tokio::time::timeout(timeout, open(place)).await {
        Ok(Ok(_)) => Verdict::passed(format!("{place} accepts connections")),
        Ok(Err(why)) => Verdict::failed(why),
        Err(_) => Verdict::failed(format!("{place} did not accept a connection within {timeout:?}")),
    }
}

/// A fresh connection, or why there is none.
pub(crate) async fn open(place: SocketAddr) -> Result<TcpStream, String> {
    TcpStream::connect(place).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            format!("{place} refuses connections: nothing listens there")
        }
        _ => format!("no connection to {place}: {error}"),
    })
}
